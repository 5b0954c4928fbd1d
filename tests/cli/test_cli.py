"""The command line on tiny models: the whole way through, and what every mistake says."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosup_fast.data.records import read_examples, write_jsonl
from cosup_fast.environment import Part
from cosup_fast.training.checkpoint import checkpoints
from cosup_fast.training.log import read_metrics


@pytest.fixture
def fields(llama_folder, data_folder, tmp_path):
    """Overrides of a tiny run, as a dict."""
    return {
        "output": tmp_path / "run",
        "model.gen": llama_folder,
        "data.corpus": data_folder / "passages.jsonl",
        "data.train": f"[{data_folder / 'examples.jsonl'}]",
        "data.dev": "[]",
        "training.batch_size": 2,
        "training.lr": 0.01,
        "training.steps": 4,
    }


def _arguments(fields, **changes):
    return [f"{name}={value}" for name, value in {**fields, **changes}.items()]


def test_train_index_search_generate_evaluate(cosup, fields, data_folder, tmp_path):
    status, out, err = cosup("train", *_arguments(fields, **{"data.dev": fields["data.train"], "data.train": "[]"}))
    assert status == 1
    assert "data.train" in err  # and nothing is left behind that would be in the way of the next run

    status, out, err = cosup("train", *_arguments(fields, **{"training.steps": 60, "training.batch_size": 4}))
    assert status == 0, err
    folder = tmp_path / "run"
    assert str(folder / "checkpoints" / "step-000060") in out
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 61))
    assert records[-1]["ntp"] < records[0]["ntp"]
    for name in ("config.yaml", "curves.png"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tensorboard").glob("events.*"))

    status, out, err = cosup("index", "build", folder, "--corpus", data_folder / "passages.jsonl")
    assert (status, "11 passages" in out) == (0, True), err
    status, out, err = cosup("index", "search", folder, "What is the capital of France?", "-k", "2")
    assert status == 0, err
    assert "Paris" in out

    status, out, err = cosup("generate", folder, "What is the capital of France?", "--max-new-tokens", "60", "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert answer["retrievals"][0]["candidates"][0]["passage"] == "paris"
    assert "Paris is the capital of France." in answer["text"]

    report = tmp_path / "report"
    examples = data_folder / "examples.jsonl"
    status, out, err = cosup("evaluate", folder, "--examples", examples, "--output", report, "--max-new-tokens", 20)
    assert status == 0, err
    assert json.loads((report / "report.json").read_text())["overall"]["recall@1"]["mean"] == 1.0

    other = tmp_path / "other"
    status, out, err = cosup("train", *_arguments(fields, output=other))
    assert status == 0, err
    status, out, err = cosup("generate", other, "?", "--index", folder / "index")
    assert status == 1
    assert "was not built by this model" in err


def test_mined_negatives_are_trained_on(cosup, fields, data_folder, tmp_path):
    passages = data_folder / "passages.jsonl"
    given = data_folder / "examples.jsonl"
    assert cosup("train", *_arguments(fields))[0] == 0
    mined = tmp_path / "mined.jsonl"
    wanted = ["mine", tmp_path / "run", "--examples", given, "--output", mined, "--per-example", "2"]
    status, _, err = cosup(*wanted)
    assert (status, "index.json" in err) == (1, True)  # no index yet, and no corpus to make one of
    status, out, err = cosup(*wanted, "--corpus", passages)
    assert status == 0, err
    assert "mined.jsonl: 8 negatives for 4 examples" in out
    assert (tmp_path / "run" / "index" / "index.json").is_file()
    first = mined.read_bytes()
    assert cosup(*wanted)[0] == 0
    assert mined.read_bytes() == first
    assert not list(tmp_path.glob(".mined*"))
    before, after = ({e.id: e for e in read_examples(path, None)} for path in (given, mined))
    assert list(before) == list(after)
    assert all(len(e.negatives) == 2 for e in after.values())
    harder = {"data.train": f"[{mined}]", "output": tmp_path / "harder"}
    status, _, err = cosup("train", *_arguments(fields, **harder))
    assert status == 0, err
    plain, hard = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "harder"))
    assert hard[0]["candidates"] > plain[0]["candidates"]
    assert hard[0]["nsp"] > plain[0]["nsp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{data}/examples.jsonl"], "is one of the --examples, which would be lost"),
        (["--output", "{data}"], "is a folder: name a file in it"),
        (["--output", "{data}/nowhere/mined.jsonl"], "is not a folder: make it first"),
        (["--depth", "3", "--skip-top", "3"], "skip_top=3 leaves nothing of the depth=3 passages"),
        (["--examples", "no-such-set"], "no-such-set"),
        (["--corpus", "no-such-corpus"], "no-such-corpus"),
        (["--corpus", "{data}/examples.jsonl"], "examples.jsonl:1"),
    ],
)
def test_what_mine_refuses_before_it_loads_a_model(cosup, data_folder, tmp_path, arguments, message):
    wanted = ["--examples", str(data_folder / "examples.jsonl"), "--output", str(tmp_path / "mined.jsonl")]
    status, _, err = cosup("mine", tmp_path / "no-run", *wanted, *(a.format(data=data_folder) for a in arguments))
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_mine_refuses_an_index_of_another_corpus(cosup, fields, data_folder, tmp_path):
    assert cosup("train", *_arguments(fields))[0] == 0
    assert cosup("index", "build", tmp_path / "run", "--corpus", data_folder / "passages.jsonl")[0] == 0
    lines = (data_folder / "passages.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "less.jsonl").write_text("".join(lines[:-1]))
    wanted = ["--examples", data_folder / "examples.jsonl", "--output", tmp_path / "mined.jsonl"]
    status, _, err = cosup("mine", tmp_path / "run", *wanted, "--corpus", tmp_path / "less.jsonl")
    assert status == 1
    assert "holds other passages than --corpus" in err


def test_held_out_figures_come_with_the_run(cosup, fields, data_folder, tmp_path):
    lines = (data_folder / "examples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "dev.jsonl").write_text("".join(lines[2:]))
    changes = {"data.train": f"[{tmp_path / 'train.jsonl'}]", "data.dev": f"[{tmp_path / 'dev.jsonl'}]"}
    status, _, err = cosup("train", *_arguments(fields, **changes, **{"training.eval_every": 2}))
    assert status == 0, err
    held_out = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "held-out"]
    assert [r["step"] for r in held_out] == [0, 2, 4]
    assert all(0 <= r["recall_at_1"] <= r["recall_at_5"] <= r["recall_at_20"] <= 1 for r in held_out)
    both = {"data.dev": fields["data.train"]}
    status, _, err = cosup("train", *_arguments(fields, **both, output=tmp_path / "both"))
    assert status == 1
    assert "is in data.train and in data.dev" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.lrr": 1}, "unknown field 'training.lrr', did you mean 'training.lr'?"),
        ({"training.lr": "fast"}, "training.lr: Input should be a valid number"),
        ({"model.gen": "smolm2-135m"}, "smollm2-135m"),
        ({"model.gen_layers": 9}, "has 2 layers, 9 were asked for"),
        ({"data.corpus": "no-such-corpus.jsonl"}, "no-such-corpus.jsonl"),
        ({"text.max_passage_tokens": 5}, "more than text.max_passage_tokens=5: raise that limit"),
        ({"training.device": "cuda:77"}, "training.device='cuda:77'"),
        ({"training.device": "abacus"}, "training.device='abacus'"),
    ],
)
def test_a_configuration_that_cannot_run_is_named(cosup, fields, changes, message):
    status, out, err = cosup("train", *_arguments(fields, **changes))
    assert status == 1
    assert err.startswith("error:")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"output": [{"text": "no passage"}]}, "retriev"),
        ({"output": [{"text": "x", "passage": "nowhere"}]}, "nowhere"),
        (
            {"output": [{"text": "x", "passage": "paris"}], "question": "long " * 600},
            "more than the 512 positions of Gen",
        ),
        ({"output": [{"text": "x", "pasage": "paris"}]}, "did you mean 'passage'?"),
    ],
)
def test_an_example_that_cannot_be_trained_on_is_named(cosup, fields, tmp_path, example, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"id": "bad-one", "question": "q", "answers": [], **example}) + "\n")
    status, _, err = cosup("train", *_arguments(fields, **{"data.train": f"[{path}]"}))
    assert status == 1
    assert message in err
    assert "bad-one" in err or "bad.jsonl:1" in err


def test_an_output_that_holds_something_else_is_left_alone(cosup, fields):
    output = Path(fields["output"])
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("")
    status, _, err = cosup("train", *_arguments(fields))
    assert status == 1
    assert "holds something else than a run, such as 'thesis.tex'" in err
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]


def test_an_output_that_holds_a_run_is_not_overwritten(cosup, fields):
    status, _, err = cosup("train", *_arguments(fields), "--resume")
    assert status == 0
    assert "holds no checkpoint to resume from: a new run" in " ".join(err.split())
    status, _, err = cosup("train", *_arguments(fields))
    assert status == 1
    assert "holds a run already: add --resume" in err
    status, _, err = cosup("train", *_arguments(fields, **{"training.seed": 7}), "--resume")
    assert status == 1
    assert "training.seed=7, but the run" in err
    status, _, err = cosup("train", *_arguments(fields, **{"training.steps": 6}), "--resume")
    assert status == 0, err
    records = read_metrics(Path(fields["output"]) / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "changed"] == [4]  # training.steps, from here on


def test_what_is_no_checkpoint(cosup, tmp_path):
    status, _, err = cosup("generate", tmp_path, "question")
    assert status == 1
    assert "neither a checkpoint nor the folder of a run" in err


def test_help_has_examples_everywhere(cosup):
    for command in ([], ["data"], ["index"]):
        assert cosup(*command, "--help")[0] == 0
    commands = [
        "data list", "data prepare", "data check", "data convert self-rag",
        "data convert kilt", "data convert sentence-transformers", "data convert tevatron", "data convert dpr",
        "data convert beir", "train", "index build", "index add",
        "index delete", "index search", "index info", "export", "generate", "evaluate", "compare",
        "demo", "env",
    ]  # fmt: skip
    for command in commands:
        status, out, _ = cosup(*command.split(), "--help")
        assert status == 0
        assert re.search(rf"Examples?: cosup-fast {command}", " ".join(out.split())), command


def test_env_and_show(cosup, fields):
    status, out, _ = cosup("env")
    assert status == 0
    assert "torch" in out
    assert "flash-attn" in out
    status, out, _ = cosup("train", "--show", "training.lr=0.25")
    assert status == 0
    assert "lr: 0.25" in out


def test_env_says_which_extra_to_install(cosup, monkeypatch):
    part = Part("flash-attn", False, "not installed (pip install 'cosup-fast[gpu]')")
    monkeypatch.setattr("cosup_fast.environment.describe", lambda **_: [part])
    assert part.note in cosup("env")[1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("weight_map"), r"unexpected KeyError: 'weight_map', in test_cli.py:\d+\..*cosup-fast --debug"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"),
            "^error: out of memory",
        ),
        (MemoryError(), "out of memory.*lower training.tokens_per_micro_batch"),
        (RecursionError("maximum recursion depth exceeded"), "unexpected RecursionError"),
        (OSError(28, "No space left on device", "/x/y"), "/x/y: .*free some space"),
    ],
)
def test_whatever_goes_wrong_is_one_line_unless_the_trace_is_asked_for(cosup, monkeypatch, error, said):
    def fail(**_):
        raise error

    monkeypatch.setattr("cosup_fast.environment.describe", fail)
    status, _, err = cosup("env")
    assert status == 1
    assert re.search(said, err.strip())
    assert "Traceback" not in err
    monkeypatch.setattr("cosup_fast.cli.app.DEBUG", {"on": False})
    with pytest.raises(type(error)):
        cosup("--debug", "env")


def _start(fields, *options, limit=None, **changes):
    """A real process that trains."""

    def set_limit():
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, as a full disk is
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "cosup_fast", "train", *_arguments(fields, **changes), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=set_limit,  # noqa: PLW1509
        env={**os.environ, "COLUMNS": "200", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"},
    )


def _wait_for_steps(folder, count, process):
    path = Path(folder) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(path)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _whole(folder):
    """Every checkpoint that is there loads."""
    from cosup_fast.model import CoSupervisionModel
    from cosup_fast.training.checkpoint import verify

    found = checkpoints(Path(folder) / "checkpoints")
    for path in found:
        verify(path)
        CoSupervisionModel.load(path)
    return found


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_saves_and_says_so(fields):
    process = _start(fields, **{"training.steps": 100000})
    _wait_for_steps(fields["output"], 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    (checkpoint,) = _whole(fields["output"])
    assert "finishing this step, then saving; press Ctrl-C again to stop at once" in err
    assert "interrupted" in err
    assert checkpoint.name in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_run_resumes_bit_for_bit(fields, tmp_path, cosup):
    changes = {"training.steps": 40, "training.checkpoint_every": 2}
    status, _, err = cosup("train", *_arguments(fields, **changes, output=tmp_path / "whole"))
    assert status == 0, err
    expected = [(r["step"], r["loss"], r["gen_grad_norm"]) for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    for steps in (5, 12):  # kills, the second one of the run that was resumed
        process = _start(fields, "--resume", **changes)
        _wait_for_steps(fields["output"], steps, process)
        process.kill()
        process.communicate()
        _whole(fields["output"])
    status, _, err = cosup("train", *_arguments(fields, **changes), "--resume")
    assert status == 0, err
    resumed = [
        (r["step"], r["loss"], r["gen_grad_norm"]) for r in read_metrics(Path(fields["output"]) / "metrics.jsonl")
    ]
    assert resumed == expected


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(fields, cosup):
    assert cosup("train", *_arguments(fields))[0] == 0
    before = _whole(fields["output"])
    process = _start(fields, "--resume", limit=20_000, **{"training.steps": 6})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "was not written" in err
    assert "free some space" in err
    assert _whole(fields["output"]) == before
    assert not list((Path(fields["output"]) / "checkpoints").glob(".*"))


def test_a_corpus_of_unknown_examples_is_checked_line_by_line(cosup, data_folder, tmp_path, examples):
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, examples)
    status, out, err = cosup("data", "check", path, "--corpus", data_folder / "passages.jsonl")
    assert status == 0, err
    assert "4 examples" in out
    path.write_text(path.read_text() + "{broken\n")
    status, _, err = cosup("data", "check", path, "--corpus", data_folder / "passages.jsonl")
    assert status == 1
    assert "mine.jsonl:5" in err


def test_other_peoples_text_is_printed_as_it_is(cosup, fields, data_folder, tmp_path):
    output = [{"text": "x", "passage": "paris"}]
    lines = [json.dumps({"id": f"e{i}", "question": "q", "output": output}) for i in range(99)]
    (tmp_path / "many.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    status, _, err = cosup("data", "check", tmp_path / "many.jsonl", "--corpus", data_folder / "passages.jsonl")
    assert status == 1
    assert "many.jsonl:100:" in err
    assert cosup("train", *_arguments(fields))[0] == 0
    assert cosup("index", "build", fields["output"], "--corpus", data_folder / "passages.jsonl")[0] == 0
    question = "what does [/INST] mean at :100: [bold]?"
    status, out, err = cosup("generate", fields["output"], question, "--max-new-tokens", "4")
    assert status == 0, err
    assert question in out


def test_damaged_weights_are_refused_before_they_answer(cosup, fields):
    assert cosup("train", *_arguments(fields))[0] == 0
    (checkpoint,) = checkpoints(Path(fields["output"]) / "checkpoints")
    weights = checkpoint / "embseq" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    status, _, err = cosup("index", "build", fields["output"], "--corpus", fields["data.corpus"])
    assert status == 1
    assert "was altered" in err
    weights.write_bytes(content[:1000])
    (checkpoint / "manifest.json").unlink()  # as a folder that was copied without it
    status, _, err = cosup("index", "build", checkpoint, "--corpus", fields["data.corpus"])
    assert status == 1
    assert err.startswith("error:")


def test_output_folders_are_checked_before_the_work(cosup, fields, tmp_path, monkeypatch):
    assert cosup("train", *_arguments(fields))[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    monkeypatch.setattr("cosup_fast.index.SequenceIndex.build", None)  # the work
    status, _, err = cosup("index", "build", fields["output"], "--output", tmp_path / "mine")
    assert (status, "holds something else" in err) == (1, True)
    status, _, err = cosup("evaluate", fields["output"], "--output", tmp_path / "mine")
    assert (status, "holds something else" in err) == (1, True)


def test_plain_questions_can_be_evaluated(cosup, fields, data_folder, tmp_path):
    assert cosup("train", *_arguments(fields, **{"training.steps": 1}))[0] == 0
    assert cosup("index", "build", fields["output"], "--corpus", data_folder / "passages.jsonl")[0] == 0
    record = {
        "id": "q",
        "question": "Which capital lies on the Seine?",
        "output": [],
        "answers": ["Paris"],
        "gold": ["paris"],
    }
    (tmp_path / "plain.jsonl").write_text(json.dumps(record) + "\n")
    report = tmp_path / "report"
    command = ["evaluate", fields["output"], "--examples", tmp_path / "plain.jsonl", "--max-new-tokens", 3]
    status, _, err = cosup(*command, "--output", report)
    assert status == 0, err
    assert json.loads((report / "report.json").read_text())["overall"]["mrr"]["count"] == 1


def test_every_system_answers_the_same_questions_and_is_compared(cosup, fields, data_folder, tmp_path):
    for name in ("run", "other"):
        changes = {"output": tmp_path / name, "training.steps": 1, "generation.max_new_tokens": 4}
        assert cosup("train", *_arguments(fields, **changes))[0] == 0
        assert cosup("index", "build", tmp_path / name, "--corpus", data_folder / "passages.jsonl")[0] == 0
    folder, examples = tmp_path / "run", data_folder / "examples.jsonl"
    systems = ["co-supervised", "closed-book", "gold", "random", f"pair:{tmp_path / 'other'}"]
    for system in systems:
        status, out, err = cosup(
            "evaluate", folder, "--examples", examples, "--system", system, "--out-of-domain", "dates"
        )
        assert status == 0, err
        assert "out-of-domain" in out
    assert sorted(path.name for path in (folder / "evaluation").iterdir()) == [
        "closed-book", "co-supervised", "gold", "pair-other", "random"
    ]  # fmt: skip
    gold = json.loads((folder / "evaluation" / "gold" / "report.json").read_text())
    assert gold["overall"]["perplexity"]["count"] == 4  # under what Gen began as
    assert "<!doctype html>" in (folder / "evaluation" / "gold" / "report.html").read_text()

    before, after = folder / "evaluation" / "closed-book", folder / "evaluation" / "gold" / "report.json"
    status, out, err = cosup("compare", before, after)
    assert status == 0, err
    assert "4 questions in both, 0 in one only" in out
    status, out, _ = cosup("compare", before, after, "--json", "--metric", "containment")
    assert {row["metric"] for row in json.loads(out)["metrics"]} == {"containment"}
    status, _, err = cosup("compare", before, examples)
    assert (status, "is not a report that can be read" in err) == (1, True)
    status, _, err = cosup("compare", folder, after)
    assert (status, "such as RUN/evaluation/co-supervised" in err) == (1, True)


def test_evaluations_that_cannot_run_are_named(cosup, fields, data_folder, tmp_path):
    assert cosup("train", *_arguments(fields, **{"training.steps": 1}))[0] == 0
    folder, examples = fields["output"], data_folder / "examples.jsonl"
    (tmp_path / "empty.jsonl").write_text("")
    gold = {"id": "q", "question": "?", "output": [], "gold": ["atlantis"]}
    (tmp_path / "lost.jsonl").write_text(json.dumps(gold) + "\n")
    for options, message in [
        (["--system", "golden"], "--system 'golden' is unknown, did you mean 'gold'"),
        (["--metric", "blue"], "metric 'blue' is unknown"),
        (["--examples", tmp_path / "empty.jsonl"], "expected at least one example, found an empty file"),
        (["--examples", tmp_path / "lost.jsonl", "--system", "gold"], "expected the id of a passage in the corpus"),
        (["--examples", examples, "--judge", "nobody"], "nobody"),
        (["--examples", examples, "--fluency", "nobody"], "nobody"),
        (
            ["--system", "co-supervised"],
            "is not an index, it has no index.json: make one with `cosup-fast index build`",
        ),
    ]:
        system = [] if "--system" in options else ["--system", "closed-book"]
        status, _, err = cosup("evaluate", folder, *system, *options)
        assert (status, message in err) == (1, True), (options, err)
        assert "Traceback" not in err
    command = ["evaluate", folder, "--examples", examples, "--system", "closed-book"]
    assert cosup(*command, "--max-new-tokens", 2)[0] == 0
    status, _, err = cosup(*command, "--max-new-tokens", 3)
    assert (status, "another generation.max_new_tokens (2, now 3)" in err) == (1, True)
    answers = folder / "evaluation" / "closed-book" / "answers.jsonl"
    before = answers.read_bytes()
    for wrong in (["--judge", "nobody"], ["--index", "nowhere"], ["--max-new-tokens", "-1"]):
        assert cosup(*command, *wrong, "--overwrite")[0] == 1
        assert answers.read_bytes() == before
    assert cosup(*command, "--max-new-tokens", 3, "--overwrite")[0] == 0


def test_generation_follows_the_runs_configuration_and_options_override_it(cosup, fields, data_folder):
    settings = {"generation.ret_first": "true", "generation.max_new_tokens": 3, "generation.max_retrievals": 1}
    assert cosup("train", *_arguments(fields, **settings))[0] == 0
    closed_book = ["generate", fields["output"], "q", "--json", "--max-retrievals", "0"]
    status, out, err = cosup(*closed_book, "--no-ret-first")
    assert (status, json.loads(out)["retrievals"]) == (0, []), err  # without an index
    for options, message in (
        (["--ret-first"], "error: ret_first=true forces a retrieval and max_retrievals=0 forbids it: change one of"),
        (["--temperature", "-1"], "error: temperature: Input should be greater than or equal to 0, found -1.0"),
        (["--no-ret-first", "--top-p", "0.9"], "error: --top-p 0.9 samples, and --temperature 0 does not"),
        (["--no-ret-first", "--device", "abacus"], "error: --device='abacus'"),
    ):
        status, _, err = cosup(*closed_book, *options)
        assert (status, err.startswith(message), "pydantic" in err) == (1, True, False), err
    assert cosup("index", "build", fields["output"], "--corpus", data_folder / "passages.jsonl")[0] == 0
    _, out, _ = cosup("generate", fields["output"], "q", "--json")
    answer = json.loads(out)
    assert (answer["generated_tokens"], len(answer["retrievals"])) == (3, 1)
    _, out, _ = cosup("generate", fields["output"], "q", "--json", "--max-retrievals", "0", "--no-ret-first")
    assert json.loads(out)["retrievals"] == []
    status, _, err = cosup("generate", fields["output"], "q", "--top-p", "0")
    assert (status, "top_p" in err) == (1, True)


def test_many_questions_from_files(cosup, fields, data_folder, tmp_path, monkeypatch):
    settings = {"generation.ret_first": "true", "generation.max_new_tokens": 4, "generation.max_retrievals": 1}
    assert cosup("train", *_arguments(fields, **settings))[0] == 0
    assert cosup("index", "build", fields["output"], "--corpus", data_folder / "passages.jsonl")[0] == 0
    (tmp_path / "plain.txt").write_text("囲碁?\n\n  Where is Paris?  \n")
    rows = [{"id": "a", "question": "Who?", "instruction": "Do. "}, {"id": 7, "question": "x " * 900, "output": []}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.stdin", io.StringIO("From stdin?\n"))
    files = [option for name in ("plain.txt", "mine.jsonl") for option in ("--file", tmp_path / name)]
    output = tmp_path / "new" / "answers.jsonl"
    status, out, err = cosup(
        "generate", fields["output"], "First?", *files, "--file", "-", "--output", output, "--batch", "2"
    )
    assert (status, out) == (1, "")
    assert "'x x x" in err
    assert "tokens, more than the 512 positions of Gen" in err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    asked = ["First?", "囲碁?", "Where is Paris?", "Who?", "x " * 900, "From stdin?"]
    assert [answer["question"] for answer in answers] == asked
    assert [answer.get("id") for answer in answers] == [None, None, None, "a", 7, None]
    assert [answer["stop_reason"] for answer in answers] == ["max_new_tokens"] * 4 + ["error", "max_new_tokens"]
    assert not output.with_name("answers.jsonl.partial").exists()
    # The same in one stream, and shown to people in the order of the questions.
    status, out, err = cosup("generate", fields["output"], "First?", "Second?", "--json", "--ctx-truncate")
    assert (status, [json.loads(line)["question"] for line in out.splitlines()]) == (0, ["First?", "Second?"])
    status, out, err = cosup("generate", fields["output"], "First?", "Second?", "Third?")
    assert status == 0, err
    assert [line[2:] for line in out.splitlines() if line.startswith("Q ")] == ["First?", "Second?", "Third?"]
    assert out.count("retrieved (") == 3
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert texts[0].strip() in out


def test_questions_that_cannot_be_read(cosup, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"question": "ok"}\n{"question": \n')
    (tmp_path / "blank.jsonl").write_text('{"question": " "}\n')
    (tmp_path / "empty.txt").write_text("\n")
    for files, message in [
        (["broken.jsonl"], "broken.jsonl:2: expected one JSON object"),
        (["blank.jsonl"], "blank.jsonl:1: question:"),
        (["empty.txt"], "no question was given"),
        (["none.txt"], "none.txt: expected a file of questions, found none"),
    ]:
        status, _, err = cosup("generate", tmp_path, *(o for f in files for o in ("--file", tmp_path / f)))
        assert (status, message in err) == (1, True), err
    status, _, err = cosup("generate", tmp_path)
    assert (status, "no question was given" in err) == (1, True)


def test_what_was_answered_before_an_interruption_is_kept(cosup, fields, data_folder, tmp_path, monkeypatch):
    settings = {"generation.max_new_tokens": 3, "generation.max_retrievals": 0}
    assert cosup("train", *_arguments(fields, **settings))[0] == 0
    assert cosup("index", "build", fields["output"], "--corpus", data_folder / "passages.jsonl")[0] == 0
    from cosup_fast.generation import Decoder

    step, calls = Decoder.step, []

    def interrupted(self):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(1)
        return step(self)

    monkeypatch.setattr(Decoder, "step", interrupted)
    output = tmp_path / "answers.jsonl"
    questions = [f"Question {n}?" for n in range(5)]
    status, _, err = cosup("generate", fields["output"], *questions, "--output", output, "--batch", "1")
    assert status == 130
    assert "interrupted: 2 of 5 questions are answered" in err
    assert not output.exists()
    partial = [json.loads(line) for line in (tmp_path / "answers.jsonl.partial").read_text().splitlines()]
    assert [answer["question"] for answer in partial] == questions[:2]


def test_checking_nothing_is_no_success(cosup, tmp_path, monkeypatch):
    monkeypatch.setenv("COSUP_HOME", str(tmp_path))
    status, _, err = cosup("data", "check")
    assert (status, "nothing is prepared yet" in err) == (1, True)


def test_a_corpus_is_checked_without_examples(cosup, data_folder):
    status, _, err = cosup("data", "check", "--corpus", "/nosuch")
    assert (status, "corpus '/nosuch': expected a JSONL file" in err) == (1, True)
    status, out, err = cosup("data", "check", "--corpus", data_folder / "passages.jsonl")
    assert (status, "11 passages" in out + err) == (0, True)


def test_a_missing_package_is_named_with_its_remedy(cosup, fields, monkeypatch):
    assert cosup("train", *_arguments(fields))[0] == 0
    monkeypatch.setitem(sys.modules, "faiss", None)
    command = ["index", "build", fields["output"], "--corpus", fields["data.corpus"]]
    status, _, err = cosup(*command, "--factory", "HNSW8")
    assert (status, "pip install 'cosup-fast[index]'" in err) == (1, True)
    assert cosup(*command)[0] == 0  # torch searches as exactly
