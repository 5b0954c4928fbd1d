"""A journal is read as it was written, or refused."""

from __future__ import annotations

import pytest

from cosup_fast.files import Journal


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "content", [b'{"question": "Who?", "answer": "one line without an end"}', b"a text", b"a\nb\n"]
)
def test_a_file_that_is_no_journal_is_left_as_it_was(content, restart, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"answers\.jsonl(:1 is damaged| is not a journal)"):
        Journal(path, {"of": "it"}, restart=restart)
    assert path.read_bytes() == content


@pytest.mark.parametrize("length", [0, 1, 7, 20])
def test_a_journal_whose_first_line_was_cut_off_by_a_kill_begins_again(length, tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {"of": "it"}):
        whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with Journal(path, {"of": "it"}):
        assert path.read_bytes() == whole


def test_a_journal_is_not_written_through_a_link(tmp_path):
    (tmp_path / "mine.txt").touch()
    (tmp_path / "journal.jsonl").symlink_to("mine.txt")
    with pytest.raises(ValueError, match=r"journal\.jsonl is a link to .*mine\.txt"):
        Journal(tmp_path / "journal.jsonl", {"of": "it"})
    assert (tmp_path / "mine.txt").read_bytes() == b""


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
