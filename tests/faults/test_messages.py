"""What a user gets wrong, and what is said: one line, with the file or the argument and the remedy."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from cosup_fast.data.records import DataError, read_examples
from cosup_fast.files import replace_file

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("generate run Where? --index nowhere --max-retrievals 0", "--index nowhere"),
        ("generate run Where? --max-retrievals 0 --ret-first", "ret_first=true"),
        ("generate run Where? --max-retrievals 0 --ctx-truncate", "--ctx-truncate is about passages"),
        ("generate run Where? --max-retrievals 0 --candidates 3", "--candidates is about passages"),
        ("generate run Where? --max-retrievals 0 --allow-stale", "--allow-stale is about passages"),
        ("generate run Where? --seed 3", "--seed 3 samples"),
        ("serve run --max-retrievals 0 --allow-stale", "--allow-stale is about passages"),
        ("generate run Where? --temperature inf", "temperature: Input should be a finite number"),
        ("generate run Where? --temperature nan", "temperature"),
        ("generate run Where? --device meta", "--device='meta'"),
        ("generate run Where? --device mps", "--device='mps'"),
        ("generate run --file questions.jsonl --output questions.jsonl", "--output questions.jsonl"),
        ("generate run --file linked.jsonl --output questions.jsonl", "--output questions.jsonl"),
        ("evaluate run --examples examples.jsonl --system closed-book --ret-first", "ret-first"),
        ("evaluate run --examples examples.jsonl --system closed-book --max-retrievals 2", "max-retrievals"),
        ("train run.yaml output=new training.lr=inf", "training.lr"),
        ("train run.yaml output=new training.embseq_lr=inf", "training.embseq_lr"),
        ("train run.yaml output=new training.clip=inf", "training.clip"),
        ("train run.yaml output=new training.weight_decay=inf", "training.weight_decay"),
        ("train run.yaml output=new training.max_minutes=nan", "training.max_minutes"),
        ("train run.yaml output=new training.device=meta", "training.device='meta'"),
        ("train run.yaml output=new nsp.temperature=inf", "nsp.temperature"),
        ("train run.yaml output=new nsp.temperature=1e-3 nsp.learnable_temperature=true", "nsp.temperature=0.001"),
        ("train run.yaml output=new text.prompt={question:>100000000}", "text.prompt="),
        ("train run.yaml output=new text.passage={text!r}", "text.passage="),
        ("train output=new model.gen=model data.corpus=passages.jsonl data.train=[examples.jsonl]", "data.dev"),
        ("data check --corpus nowhere.jsonl", "corpus 'nowhere.jsonl'"),
        ("index delete run --ids-file nowhere.txt", "--ids-file nowhere.txt"),
        ("index delete run --ids-file run", "--ids-file run"),
        ("export run new --what everything", "everything"),
        ("export run /dev/null", "/dev/null"),
        ("mine run --examples examples.jsonl --output examples.jsonl", "--output examples.jsonl"),
        ("mine run --examples examples.jsonl --corpus passages.jsonl --output passages.jsonl", "read as --corpus"),
        ("mine run --examples examples.jsonl --output mined.jsonl --margin inf", "margin"),
        ("data convert kilt nq-dev-kilt.jsonl --output new --gold everything", "everything"),
        ("data convert kilt converted.json --output new", "converted.json"),
        ("study study.yaml --only nothing", "nothing"),
        ("plan --preset nothing", "--preset nothing"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, said, scratch, cosup):
    place = scratch()
    (place / "linked.jsonl").symlink_to("questions.jsonl")
    shutil.copy("nq-dev-kilt.jsonl", "converted.json")
    status, _, err = cosup(*arguments.split())
    assert status in (1, 2), err
    assert said in err
    assert "unexpected" not in err


@pytest.mark.parametrize(
    ("file", "content", "arguments", "said"),
    [
        (
            "examples.jsonl",
            DEEP,
            "data check examples.jsonl --corpus passages.jsonl",
            "examples.jsonl:1: expected one JSON",
        ),
        (
            "passages.jsonl",
            DEEP,
            "data check examples.jsonl --corpus passages.jsonl",
            "passages.jsonl:1: expected one JSON",
        ),
        (
            "examples.jsonl",
            '{"id": "e", "question": "a", "question": "b", "output": []}',
            "data check examples.jsonl --corpus passages.jsonl --allow-no-retrieval",
            "(the key 'question' occurs twice)",
        ),
        (
            "examples.jsonl",
            DEEP,
            "evaluate run --examples examples.jsonl --fluency none",
            "examples.jsonl:1: expected one JSON",
        ),
        ("questions.jsonl", DEEP, "generate run --file questions.jsonl", "questions.jsonl:1: expected one JSON"),
        ("run.yaml", DEEP, "train run.yaml", "run.yaml: cannot be read as YAML"),
        ("study.yaml", DEEP, "study study.yaml --status", "study.yaml: cannot be read as YAML"),
        ("study.yaml", "a: &a [*a]\n", "study study.yaml --status", "study.yaml: cannot be read as YAML"),
        ("study.yaml", "? [a]\n: b\n", "study study.yaml --status", "study.yaml: cannot be read as YAML"),
        ("run/index/index.json", DEEP, "index info run", "index.json is damaged"),
        ("run/index/index.json", "[1]", "index info run", "index.json is damaged"),
        ("run/index/shard-00000/shard.json", "[1]", "index info run", "shard.json"),
        ("run/data.json", "[1]", "train run.yaml --resume training.steps=3", "data.json is damaged"),
        ("run/metrics.jsonl", '{"kind": 1}\n', "train run.yaml --resume training.steps=3", "metrics.jsonl:1: kind"),
        (
            "run/metrics.jsonl",
            '{"kind": "step", "step": 1, "ntp": 1, "nsp": 1}\n',
            "train run.yaml --resume training.steps=3",
            "metrics.jsonl:1: candidates: expected what a run writes",
        ),
        (
            "run/metrics.jsonl",
            '{"kind": "skipped", "step": 1}\n',
            "train run.yaml --resume training.steps=3",
            "metrics.jsonl:1: in_a_row: expected",
        ),
        (
            "run/metrics.jsonl",
            '{"kind": "held-out", "step": 1, "ntp": 1}\n',
            "train run.yaml --resume training.steps=3",
            "metrics.jsonl:1: recall_at_5: expected",
        ),
        ("run/metrics.jsonl", "{\n", "export run new", "metrics.jsonl:1: expected one JSON object"),
        ("run/checkpoints/best.json", "[1]", "generate run Where?", "best.json is damaged"),
        ("run/checkpoints/best.json", DEEP, "generate run Where?", "best.json is damaged"),
        (
            "run/checkpoints/step-000002/manifest.json",
            DEEP,
            "generate run/checkpoints/step-000002 Q",
            "manifest.json is damaged",
        ),
        (
            "run/checkpoints/step-000002/manifest.json",
            '{"files": {"a": 1}}',
            "generate run/checkpoints/step-000002 Q",
            "manifest.json is damaged",
        ),
        (
            "run/evaluation/co-supervised/report.json",
            DEEP,
            "compare run/evaluation/co-supervised run/evaluation/co-supervised",
            "report.json is not a report",
        ),
        ("study/cells/one-seed0.json", "[1]", "study study.yaml --report", "one-seed0.json is not a result"),
        ("model/config.json", "[1]", "train run.yaml output=new", "the configuration of 'model' cannot be read"),
        (
            "model/config.json",
            '{"model_type": "nothing"}',
            "train run.yaml output=new",
            "the configuration of 'model' cannot be read",
        ),
        (
            "model/config.json",
            '{"model_type": "llama", "vocab_size": "x"}',
            "train run.yaml output=new",
            "the configuration of 'model' cannot be read",
        ),
        ("model/tokenizer.json", "{", "train run.yaml output=new", "the tokenizer of 'model' cannot be read"),
        ("model/tokenizer_config.json", "[1]", "train run.yaml output=new", "the tokenizer of 'model' cannot be read"),
        (
            "model/adapter_config.json",
            '{"base_model_name_or_path": "elsewhere"}',
            "train run.yaml output=new",
            "holds adapters over another model",
        ),
    ],
)
def test_files_of_another_shape_are_named(file, content, arguments, said, scratch, cosup):
    (scratch() / file).write_text(content)
    status, _, err = cosup(*arguments.split())
    assert (status, said in err) == (1, True), err
    assert "unexpected" not in err


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 5000 + "a" + ")" * 5000, "[", "(?P<x>a)(?P<x>b)"])
def test_a_pattern_that_does_not_compile_is_named(pattern, tmp_path):
    path = tmp_path / "mine.jsonl"
    example = {"id": "e", "question": "q", "output": [], "gold": ["x"], "answers": [pattern], "answer_type": "regex"}
    path.write_text(json.dumps(example) + "\n")
    with pytest.raises(DataError, match=r"mine.jsonl:1: answers: expected a regular expression"):
        read_examples(path, None)


def test_a_report_without_settings_or_with_markup_is_compared_or_named(scratch, cosup):
    place = scratch() / "run/evaluation/co-supervised/report.json"
    report = json.loads(place.read_text())
    arguments = ("compare", place, place.with_name("other.json"))
    report["settings"]["system"] = "[bold]x[/red][/INST]"
    del report["crc32"]
    place.with_name("other.json").write_text(json.dumps(report))
    status, out, err = cosup(*arguments)
    assert (status, "[bold]x[/red]" in out) == (0, True), err
    del report["settings"]["judge"]
    place.with_name("other.json").write_text(json.dumps(report))
    status, _, err = cosup(*arguments)
    assert (status, "other.json is not a report that can be read (its settings lack judge)" in err) == (1, True), err


def test_an_answer_with_an_unknown_passage_is_named(scratch, cosup):
    from cosup_fast.files import checked_line

    path = scratch() / "new" / "answers.jsonl"
    arguments = (
        "evaluate",
        "run",
        "--examples",
        "examples.jsonl",
        "--fluency",
        "none",
        "--ret-first",
        "--output",
        "new",
    )
    assert cosup(*arguments)[0] == 0
    first, *lines = path.read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry.pop("crc32")
        for retrieval in entry["value"]["retrievals"]:
            retrieval["candidates"][0]["passage"] = "nowhere"
    path.write_bytes(first.encode() + b"\n" + b"".join(map(checked_line, entries)))
    status, _, err = cosup(*arguments)
    assert (status, "answers.jsonl: the answer to" in err, "not in the corpus" in err) == (1, True, True), err


@contextmanager
def full_disk(size: int):
    """Every file that this process writes ends at so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
@pytest.mark.parametrize(
    "arguments",
    [
        "export run new",
        "export run new --what gen",
        "data convert kilt nq-dev-kilt.jsonl --output new",
        "index build run --corpus passages.jsonl --output new",
        "evaluate run --examples examples.jsonl --fluency none --output new",
        "generate run --file questions.jsonl --output new",
        "mine run --examples examples.jsonl --output new",
        "train run.yaml output=new",
    ],
)
def test_a_full_disk_is_named_with_the_file(arguments, scratch, cosup):
    scratch()
    with full_disk(150):
        status, _, err = cosup(*arguments.split())
    assert status == 1, err
    assert "new" in err or tempfile.gettempdir() in err  # where it is tried whether a model can be saved
    assert "free some space" in err
    assert "unexpected" not in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_file_that_is_not_whole_is_named_where_the_system_does_not(tmp_path):
    path = tmp_path / "f.txt"
    with full_disk(10), pytest.raises(OSError, match=r"f\.txt") as error, replace_file(path) as file:
        file.write("x" * 100_000)
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_said_with_a_remedy(scratch, cosup, monkeypatch):
    from cosup_fast.model import CoSupervisionModel

    def run_out(*arguments, **options):
        return torch.empty(1 << 60)

    monkeypatch.setattr(CoSupervisionModel, "load", run_out)
    scratch()
    status, _, err = cosup("generate", "run", "Where?")
    assert (status, "out of memory" in err, "--batch" in err) == (1, True, True), err


def test_a_catastrophic_pattern_does_not_hold_mining_up(scratch, cosup, monkeypatch):
    monkeypatch.setattr("cosup_fast.data.answers.PATTERN_SECONDS", 0.05)
    place = scratch()
    lines = [{"id": f"p{i}", "title": "", "text": "a" * 60 + f"b {i}"} for i in range(200)]
    (place / "passages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    example = {"id": "e", "question": "q", "output": [], "gold": ["p0"], "answers": ["(a|a)+$"], "answer_type": "regex"}
    (place / "examples.jsonl").write_text(json.dumps(example) + "\n")
    arguments = (
        "mine run --examples examples.jsonl --corpus passages.jsonl --index new --output mined.jsonl --depth 200"
    )
    with pytest.warns(UserWarning, match="took more than"):
        status, _, err = cosup(*arguments.split())
    assert status == 0, err


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_weights_have_the_mode_of_other_files(scratch, cosup):
    place = scratch()
    assert cosup("export", "run", "exported")[0] == 0
    assert cosup("export", "run", "exported-gen", "--what", "gen")[0] == 0
    (place / "plain").write_text("")
    expected = (place / "plain").stat().st_mode
    for folder in ("run", "exported", "exported-gen", "adapted"):
        for path in (place / folder).rglob("*"):
            if path.is_file() and ".lock" not in path.name:
                assert path.stat().st_mode == expected, path


def test_an_output_that_cannot_encode_a_character_gets_the_answers_all_the_same(scratch):
    place = scratch()
    run = subprocess.run(
        [sys.executable, "-m", "cosup_fast", "generate", "run", "囲碁?", "--max-retrievals", "0"],
        cwd=place,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert rb"Q \u56f2\u7881?" in run.stdout


def test_lines_of_training_appear_where_no_terminal_is(scratch, cosup):
    scratch()
    changes = ["output=new", "training.steps=10", "data.dev=[]", "training.keep_best=null", "training.eval_every=null"]
    status, _, err = cosup("train", "run.yaml", *changes)
    assert (status, "step 10 of 10 NTP" in err) == (0, True), err


def test_ranks_that_were_started_otherwise_are_told_the_field():
    from cosup_fast.training.resume import check_same_run

    def meet(purpose, note):
        return [note, {"configuration": {"training": {"lr": 0.2, "steps": 3}}, "data": note["data"]}]

    peers = SimpleNamespace(names=[0, 1], rank=0, meet=meet)
    ours = {"configuration": {"training": {"lr": 0.1, "steps": 3}}, "data": {"training": "a" * 64}}
    with pytest.raises(ValueError, match=r"rank 1 has another configuration than rank 0 \(training.lr=0.2 there"):
        check_same_run(peers, "the same run", ours)  # type: ignore[arg-type]
