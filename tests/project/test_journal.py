"""A journal is read as it was written, or refused."""

from __future__ import annotations

import pytest

from cosup_fast.files import Journal


@pytest.mark.parametrize("restart", [False, True])
def test_no_changed_byte_of_a_journal_is_used(restart, tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"of": "it"}) as journal:
        journal.add("x", {"score": 1.5})
        journal.add("y", [True])
        kept = dict(journal.done)
    whole, refused = path.read_bytes(), []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            with Journal(path, {"of": "it"}, restart=restart) as journal:
                assert journal.done.items() <= kept.items(), place  # without a last line that seems cut off
                assert "x" in journal.done, place
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) >= len(whole) - 1
    assert all("journal.jsonl:" in error and "is damaged" in error for error in refused)
