"""The scripts that measure an index and a corpus by their size run, and count what is theirs."""

from __future__ import annotations

from benchmarks import corpus_size, index_size


def test_a_corpus_is_opened_and_read(tmp_path):
    corpus_size.write(tmp_path / "corpus.jsonl", 300)
    found = corpus_size.start(tmp_path / "corpus.jsonl", tmp_path / "cache")
    assert found["seconds"] > 0
    assert found["own"] < 64 << 20


def test_an_index_is_written_opened_and_searched(tmp_path):
    found = index_size.here(str(tmp_path / "index"), 300, 8)
    assert all(found[step] > 0 for step in ("write", "open", "first", "again"))
    assert found["peak"] >= found["own"] > 0
