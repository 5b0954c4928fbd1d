"""`cosup-fast index`: the whole life of an index, and what every mistake says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from cosup_fast.data.records import Passage, write_jsonl
from cosup_fast.index import SequenceIndex


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A checkpoint in a folder of this test."""
    (tmp_path / "run").symlink_to(checkpoint)
    return tmp_path / "run"


def test_build_search_add_delete_info(cosup, copied, data_folder, tmp_path):
    index = tmp_path / "index"
    corpus = data_folder / "passages.jsonl"
    command = ["index", "build", copied, "--corpus", corpus, "--output", index, "--shard-size", 4]
    status, out, err = cosup(*command, "--factory", "IVF2,Flat", "--parameters", "nprobe=2")
    assert (status, "(11 passages)" in out) == (0, True), err
    answers = []
    for engine in ("auto", "approximate", "faiss", "torch"):
        status, out, err = cosup("index", "search", copied, "Where?", "--index", index, "-k", 100, "--engine", engine)
        assert status == 0, err
        answers.append(out)
    assert len(set(answers)) == 1
    assert all(name in answers[0] for name in ("euclid", "emoji", "[NSP]"))

    write_jsonl(tmp_path / "more.jsonl", [Passage(id="oslo", title="Oslo", text="Oslo is the capital of Norway.")])
    status, out, err = cosup("index", "add", copied, tmp_path / "more.jsonl", "--index", index)
    assert (status, "added 1 passages" in out, "(12 passages)" in out) == (0, True, True), err
    status, _, err = cosup("index", "add", copied, tmp_path / "more.jsonl", "--index", index)
    assert (status, "all of its 1 passages are in the index already" in err) == (1, True)

    (tmp_path / "gone.txt").write_text("rome\n\nparis\n")
    status, out, err = cosup("index", "delete", index, "go", "--ids-file", tmp_path / "gone.txt")
    assert (status, "deleted 3 passages" in out, "(9 passages)" in out) == (0, True, True), err
    status, _, err = cosup("index", "delete", index, "rome")
    assert (status, "no passage has the id 'rome': nothing was deleted" in err) == (1, True)
    status, _, err = cosup("index", "delete", index)
    assert (status, "name the ids" in err) == (1, True)

    status, out, err = cosup("index", "info", index, "--verify")
    assert status == 0, err
    for text in ("passages │ 9", "IVF2,Flat nprobe=2", "changes since it was built │ 2", "{title} :: {text}"):
        assert text in " ".join(out.split()), text
    assert os.listdir(index.parent / "index") == os.listdir(index)
    vectors = next(index.glob("shard-*/vectors.npy"))
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"!")
    assert cosup("index", "info", index)[0] == 0
    status, _, err = cosup("index", "info", index, "--verify")
    assert (status, "was altered" in err) == (1, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--factory", "IVFx"], "factory='IVFx' makes no FAISS index"),
        (["--factory", "IVF64,Flat"], "has 64 clusters for 11 passages"),
        (["--parameters", "nprobe=3"], "give a factory, too"),
        (["--precision", "float8"], "precision='float8': choose float32 or bfloat16"),
        (["--corpus", "wiki-lead"], "did you mean 'wiki-leads'"),
    ],
)
def test_mistakes_are_named_before_the_work(cosup, copied, data_folder, tmp_path, options, message):
    command = ["index", "build", copied, "--corpus", data_folder / "passages.jsonl", "--output", tmp_path / "i" / "x"]
    status, _, err = cosup(*command, *options)
    assert (status, message in err) == (1, True), err
    assert sorted(os.listdir(tmp_path)) in (["run"], ["i", "run"])
    assert not (tmp_path / "i").exists() or os.listdir(tmp_path / "i") == []


def test_another_checkpoint_is_refused_unless_allowed(cosup, copied, data_folder, make_model, tmp_path):
    make_model(text={"passage": "{text}"}).save(tmp_path / "other")
    corpus = data_folder / "passages.jsonl"
    assert cosup("index", "build", copied, "--corpus", corpus, "--output", tmp_path / "i")[0] == 0
    for command in (["search", tmp_path / "other", "q"], ["add", tmp_path / "other", corpus]):
        status, _, err = cosup("index", *command, "--index", tmp_path / "i")
        assert (status, "was not built by this model: its text.passage" in err) == (1, True)
    assert "--allow-stale" in err
    status, _, err = cosup("index", "search", tmp_path / "other", "q", "--index", tmp_path / "i", "--allow-stale")
    assert status == 0, err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_says_how_to_go_on_and_the_next_run_does(cosup, copied, tmp_path, keyboard):
    passages = [Passage(id=str(i), title="", text=f"{i} " + "word " * 60) for i in range(3000)]
    write_jsonl(tmp_path / "big.jsonl", passages)
    command = ["index", "build", copied, "--corpus", tmp_path / "big.jsonl", "--output", tmp_path / "i"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cosup_fast", *map(str, command), "--shard-size", "100"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / ".i.building").glob("shard-*/shard.json"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "of 30 shards are finished; the same command continues after them" in " ".join(err.split())
    assert not (tmp_path / "i").exists()
    status, _, err = cosup(*command, "--shard-size", 100)
    assert status == 0, err
    assert "of 30 shards are there already" in err
    assert json.loads((tmp_path / "i" / "index.json").read_text())["count"] == 3000
    assert sorted(os.listdir(tmp_path)) == ["big.jsonl", "i", "run"]


@pytest.mark.slow
def test_torchrun_builds_what_one_process_builds(cosup, copied, data_folder, tmp_path):
    """The real launcher; on an error it ends with the line that is broken, and leaves nothing."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    def build(corpus, folder):
        options = ["--corpus", corpus, "--output", folder, "--shard-size", 2, "--device", "cpu"]
        command = [*launcher, "-m", "cosup_fast", "index", "build", copied, *options]
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, env=environment, timeout=550, check=False
        )

    done = build(data_folder / "passages.jsonl", tmp_path / "shared")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("11 passages") == 1
    status, _, err = cosup("index", "build", copied, "--corpus", data_folder / "passages.jsonl", "--shard-size", 2)
    assert status == 0, err
    shared, alone = (SequenceIndex.open(folder) for folder in (tmp_path / "shared", copied / "index"))
    assert torch.equal(shared.embeddings, alone.embeddings)
    assert list(shared.passages) == list(alone.passages)

    broken = tmp_path / "broken.jsonl"
    broken.write_bytes((data_folder / "passages.jsonl").read_bytes() + b"{half\n")
    done = build(broken, tmp_path / "half")
    assert done.returncode != 0
    assert "broken.jsonl:12: expected one JSON object" in " ".join(done.stderr.split())
    assert not [path for path in tmp_path.iterdir() if "half" in path.name]
