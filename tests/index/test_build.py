"""Building from a stream: resumed after kills, shared by ranks, and nothing half-built from a corpus with a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from cosup_fast.data.corpus import FileCorpus, open_corpus
from cosup_fast.data.records import DataError, Passage, write_jsonl
from cosup_fast.files import locked
from cosup_fast.index import Options, Origin, SequenceIndex, embed_passages
from cosup_fast.index.build import default_shard_size

SMALL = Options(shard_size=4, progress=False)


@pytest.fixture
def corpus(passages, tmp_path):
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, passages)
    return path


def _run(*arguments):
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("processes.py")), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=550,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")
def test_killed_at_any_moment_it_continues_to_the_same_bits(checkpoint, corpus, tmp_path):
    (tmp_path / "place").mkdir()
    done = _run("kill", checkpoint, corpus, tmp_path / "place" / "index")
    assert done.returncode == 0, done.stderr[-3000:]
    kills = dict(line.split() for line in done.stdout.splitlines())
    assert int(kills["build"]) > 5, kills
    assert int(kills["add"]) > 5, kills
    assert int(kills["delete"]) > 1, kills
    assert not list((tmp_path / "place").rglob("*.new"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")
def test_ranks_share_the_work_and_the_errors(checkpoint, model, corpus, tmp_path, passages):
    (tmp_path / "place").mkdir()
    folder = tmp_path / "place" / "index"
    done = _run("ranks", checkpoint, corpus, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = SequenceIndex.load(folder, model)
    alone = SequenceIndex.build(model, corpus, tmp_path / "alone", options=SMALL)
    assert torch.equal(loaded.embeddings, alone.embeddings)
    assert list(loaded.passages) == passages

    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join([*lines[:5], "{broken\n", *lines[5:]]))  # in the second shard: rank 1's
    done = _run("ranks", checkpoint, corpus, folder)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("passages.jsonl:6: expected one JSON object") == 2
    assert "rank 0: rank 1: " in done.stdout
    assert os.listdir(tmp_path / "place") == ["index"]
    assert len(SequenceIndex.load(folder, model)) == 11


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")
def test_a_lost_rank_is_named_in_time_and_a_slow_one_is_waited_for(checkpoint, model, corpus, tmp_path):
    done = _run("lost", checkpoint, corpus, tmp_path / "place")
    assert done.returncode == 0, done.stderr[-3000:]
    late = "rank 0: {}: rank 1 did not come within 2 s"
    said = [line.split(";")[0] for line in done.stdout.splitlines()]
    assert said == [
        "slow 0",
        late.format("start"), "absent 3",
        late.format("index"), "dies 3",
        late.format("index"), "hangs 3",
    ]  # fmt: skip
    for last, finished in (("absent", 0), ("dies", 2), ("hangs", 2)):
        assert len(list((tmp_path / "place").glob(f".{last}.building/*/shard.json"))) == finished
    SequenceIndex.build(model, corpus, tmp_path / "place" / "hangs", options=SMALL)
    assert sorted(os.listdir(tmp_path / "place")) == [".dies.building", "hangs", "slow"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (b"{broken", r"passages\.jsonl:6: expected one JSON object"),
        (b'{"id": "new", "title": "", "txt": "x"}', r"passages\.jsonl:6: txt: expected one of .* did you mean 'text'"),
        (b"\xff\xfe", r"passages\.jsonl:6: expected UTF-8, found byte 0xff"),
        (b'{"id": "new", "title": "\\ud800", "text": "x"}', r"passages\.jsonl:6: title: expected Unicode text"),
        (b'{"id": "paris", "title": "", "text": "x"}',
         r"passages\.jsonl:6: id: expected a new id, found 'paris' of .*passages\.jsonl:1 again"),
        (b'{"id": "new", "title": "", "text": "' + b"word " * 400 + b'"}', "'new' has .* tokens"),
    ],
)  # fmt: skip
def test_a_fault_is_named_and_leaves_nothing(model, corpus, tmp_path, monkeypatch, fault, message):
    (tmp_path / "place").mkdir()
    lines = corpus.read_bytes().splitlines(keepends=True)
    corpus.write_bytes(b"".join([*lines[:5], fault + b"\n", *lines[5:]]))
    monkeypatch.setattr(model, "embed", None)  # it is found before anything is embedded
    with pytest.raises(ValueError, match=message):
        SequenceIndex.build(model, corpus, tmp_path / "place" / "index", options=SMALL)
    assert os.listdir(tmp_path / "place") == []


def test_an_unfinished_build_of_something_else_is_not_lost(model, make_model, corpus, passages, tmp_path, monkeypatch):
    folder = tmp_path / "index"

    def stop(after):
        count = iter(range(after))
        save = np.save

        def limited(*arguments, **options):
            if "vectors" in str(arguments[0].name):
                next(count)
            save(*arguments, **options)

        monkeypatch.setattr("cosup_fast.index.shards.np.save", limited)

    stop(2)
    with pytest.raises(StopIteration):
        SequenceIndex.build(model, corpus, folder, options=SMALL)
    monkeypatch.undo()
    unfinished = {path.name for path in (tmp_path / ".index.building").rglob("vectors.npy")}
    assert unfinished
    for other in (
        {"model": make_model(text={"passage": "{text}"})},
        {"corpus": passages[:-1]},
        {"options": Options(shard_size=5, progress=False)},
        {"options": Options(shard_size=4, precision="bfloat16", progress=False)},
    ):
        with pytest.raises(ValueError, match=r"holds an unfinished build of another .* \(--restart\)"):
            SequenceIndex.build(**{"model": model, "corpus": corpus, "folder": folder, "options": SMALL} | other)
    with (
        locked(tmp_path / ".index.building"),
        pytest.raises(ValueError, match="another process is building"),
    ):
        SequenceIndex.build(model, corpus, folder, options=SMALL)
    vectors = tmp_path / ".index.building" / "shard-00000" / "vectors.npy"
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"x")  # a finished shard that a disk has damaged
    index = SequenceIndex.build(model, corpus, folder, options=SMALL)
    torch.testing.assert_close(index.embeddings, embed_passages(model, passages), rtol=0, atol=2e-6)
    stop(1)
    with pytest.raises(StopIteration):
        SequenceIndex.build(model, corpus, folder, options=SMALL)
    monkeypatch.undo()
    fewer = SequenceIndex.build(model, passages[:3], folder, options=Options(restart=True, progress=False))
    assert len(fewer) == 3
    assert sorted(os.listdir(tmp_path)) == ["index", "passages.jsonl"]


def test_an_embedding_that_is_no_number_is_named(make_model, passages, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.embseq.embed_tokens.weight[model.template.encode("囲")[0]] = torch.nan
    with pytest.raises(ValueError, match="the embedding of passage 'go' is not finite"):
        SequenceIndex.build(model, passages, tmp_path / "index", options=SMALL)


def test_bfloat16_products_are_near_and_stamped(model, passages, tmp_path):
    options = Options(precision="bfloat16", progress=False)
    index = SequenceIndex.build(model, passages, tmp_path / "i", options=options)
    exact = embed_passages(model, passages)
    assert 1e-4 < (index.embeddings - exact).abs().max() < 0.1
    in_memory = SequenceIndex.build(model, passages, options=options)
    assert torch.equal(in_memory.embeddings, index.embeddings)
    assert in_memory.precision == "bfloat16"
    assert SequenceIndex.load(tmp_path / "i", model).precision == "bfloat16"


def test_options_are_checked():
    with pytest.raises(ValueError, match="shard_size=0"):
        Options(shard_size=0)
    with pytest.raises(ValueError, match="precision='float16': choose float32 or bfloat16"):
        Options(precision="float16")  # type: ignore[arg-type]
    assert [default_shard_size(n) for n in (1, 10_033, 1_000_000, 21_000_000)] == [512, 512, 3907, 65536]


def test_corpora_of_every_kind_are_the_same(corpus, passages, monkeypatch):
    rows = datasets.Dataset.from_list([p.model_dump() for p in passages])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    for source in (corpus, str(corpus), passages, "hf:owner/name"):
        opened = open_corpus(source)
        assert len(opened) == len(passages)
        assert [p for start in range(0, 11, 3) for p in opened.read(start, min(start + 3, 11))] == passages
        assert list(opened.read(4, 4)) == []
    assert open_corpus("hf:owner/name").where(3) == "hf:owner/name:train:row 3"
    assert open_corpus(passages).digest != open_corpus(passages[::-1]).digest


def test_blank_lines_and_a_byte_order_mark_count_as_lines_only(tmp_path):
    record = json.dumps({"id": "%s", "title": "é\u2028", "text": "x"}, ensure_ascii=False)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{record % 'a'}\r\n\n  \n{record % 'b'}\n\n{record % 'c'}".encode())
    opened = open_corpus(path)
    assert [p.id for p in opened.read(0, 3)] == ["a", "b", "c"]
    assert [opened.where(row) for row in range(3)] == [f"{path}:{line}" for line in (1, 4, 6)]
    assert [p.id for p in opened.read(1, 2)] == ["b"]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="expected at least one passage, found an empty corpus"):
        open_corpus(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="expected a JSONL file"):
        open_corpus(tmp_path / "none.jsonl")


def test_a_corpus_is_never_held_whole(tmp_path):
    path = tmp_path / "big.jsonl"
    with open(path, "w") as file:
        for i in range(2000):
            file.write(json.dumps({"id": str(i), "title": "t", "text": "word " * 2000}) + "\n")
    assert path.stat().st_size > 19e6
    tracemalloc.start()
    corpus = FileCorpus(path)
    count = sum(len(p.text) > 0 for start in range(0, 2000, 100) for p in corpus.read(start, start + 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 2e6


def test_a_loaded_index_reads_only_what_is_asked_for(model, tmp_path):
    folder = tmp_path / "index"
    passages = [Passage(id=str(i), title="t", text=f"{i} " + "é" * 3000) for i in range(300)]
    index = SequenceIndex(passages, torch.randn(300, model.width), Origin.of(model))
    index.save(folder)
    tracemalloc.start()
    loaded = SequenceIndex.load(folder, model, verify=False)
    assert loaded.passages[299] == passages[299]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (folder / "shard-00000" / "passages.jsonl").stat().st_size > 1.5e6
    assert peak < 4e5
