"""The command line on tiny models: the whole way through, and what every mistake says."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

import cosup_fast
from cosup_fast.data.records import read_examples, write_jsonl
from cosup_fast.environment import Part
from cosup_fast.training.checkpoint import checkpoints
from cosup_fast.training.log import read_metrics


def test_train_index_search_generate_evaluate(cosup, fields, data_folder, tmp_path, arguments):
    status, out, err = cosup("train", *arguments(**{"data.dev": fields["data.train"], "data.train": "[]"}))
    assert status == 1
    assert "data.train" in err  # and nothing is left behind that would be in the way of the next run

    status, out, err = cosup("train", *arguments(**{"training.steps": 60, "training.batch_size": 4}))
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
    status, out, err = cosup("train", *arguments(output=other))
    assert status == 0, err
    status, out, err = cosup("generate", other, "?", "--index", folder / "index")
    assert status == 1
    assert "was not built by this model" in err


def test_mined_negatives_are_trained_on(cosup, data_folder, tmp_path, arguments):
    passages = data_folder / "passages.jsonl"
    given = data_folder / "examples.jsonl"
    assert cosup("train", *arguments())[0] == 0
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
    status, _, err = cosup("train", *arguments(**harder))
    assert status == 0, err
    plain, hard = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "harder"))
    assert hard[0]["candidates"] > plain[0]["candidates"]
    assert hard[0]["nsp"] > plain[0]["nsp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{data}/examples.jsonl"], "is read as --examples, and would be lost"),
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


def test_mine_refuses_an_index_of_another_corpus(cosup, data_folder, tmp_path, arguments):
    assert cosup("train", *arguments())[0] == 0
    assert cosup("index", "build", tmp_path / "run", "--corpus", data_folder / "passages.jsonl")[0] == 0
    lines = (data_folder / "passages.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "less.jsonl").write_text("".join(lines[:-1]))
    wanted = ["--examples", data_folder / "examples.jsonl", "--output", tmp_path / "mined.jsonl"]
    status, _, err = cosup("mine", tmp_path / "run", *wanted, "--corpus", tmp_path / "less.jsonl")
    assert status == 1
    assert "holds other passages than --corpus" in err


def test_held_out_figures_come_with_the_run(cosup, fields, data_folder, tmp_path, arguments):
    lines = (data_folder / "examples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "dev.jsonl").write_text("".join(lines[2:]))
    changes = {"data.train": f"[{tmp_path / 'train.jsonl'}]", "data.dev": f"[{tmp_path / 'dev.jsonl'}]"}
    status, _, err = cosup("train", *arguments(**changes, **{"training.eval_every": 2}))
    assert status == 0, err
    held_out = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "held-out"]
    assert [r["step"] for r in held_out] == [0, 2, 4]
    assert all(0 <= r["recall_at_1"] <= r["recall_at_5"] <= r["recall_at_20"] <= 1 for r in held_out)
    both = {"data.dev": fields["data.train"]}
    status, _, err = cosup("train", *arguments(**both, output=tmp_path / "both"))
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
def test_a_configuration_that_cannot_run_is_named(cosup, changes, message, arguments):
    status, out, err = cosup("train", *arguments(**changes))
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
def test_an_example_that_cannot_be_trained_on_is_named(cosup, tmp_path, example, message, arguments):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"id": "bad-one", "question": "q", "answers": [], **example}) + "\n")
    status, _, err = cosup("train", *arguments(**{"data.train": f"[{path}]"}))
    assert status == 1
    assert message in err
    assert "bad-one" in err or "bad.jsonl:1" in err


def test_an_output_that_holds_something_else_is_left_alone(cosup, fields, arguments):
    output = Path(fields["output"])
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("")
    status, _, err = cosup("train", *arguments())
    assert status == 1
    assert "holds something else than a run, such as 'thesis.tex'" in err
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]


def test_an_output_that_holds_a_run_is_not_overwritten(cosup, fields, arguments):
    status, _, err = cosup("train", *arguments(), "--resume")
    assert status == 0
    assert "holds no checkpoint to resume from: a new run" in " ".join(err.split())
    status, _, err = cosup("train", *arguments())
    assert status == 1
    assert "holds a run already: add --resume" in err
    status, _, err = cosup("train", *arguments(**{"training.seed": 7}), "--resume")
    assert status == 1
    assert "training.seed=7, but the run" in err
    status, _, err = cosup("train", *arguments(**{"training.steps": 6}), "--resume")
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


def test_env_and_show(cosup):
    status, out, _ = cosup("env")
    assert status == 0
    assert "torch" in out
    assert "flash-attn" in out
    status, out, _ = cosup("train", "--show", "training.lr=0.25")
    assert status == 0
    assert "lr: 0.25" in out


def test_version(cosup):
    assert cosup("--version")[:2] == (0, f"cosup-fast {cosup_fast.__version__}\n")


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


def test_a_signal_outside_of_a_command_ends_it_like_one_inside(cosup, monkeypatch):
    def stopped():
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("cosup_fast.cli.app.app", stopped)
    assert cosup("env") == (130, "", "")


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


def test_other_peoples_text_is_printed_as_it_is(cosup, fields, data_folder, tmp_path, arguments):
    output = [{"text": "x", "passage": "paris"}]
    lines = [json.dumps({"id": f"e{i}", "question": "q", "output": output}) for i in range(99)]
    (tmp_path / "many.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    status, _, err = cosup("data", "check", tmp_path / "many.jsonl", "--corpus", data_folder / "passages.jsonl")
    assert status == 1
    assert "many.jsonl:100:" in err
    assert cosup("train", *arguments())[0] == 0
    assert cosup("index", "build", fields["output"], "--corpus", data_folder / "passages.jsonl")[0] == 0
    question = "what does [/INST] mean at :100: [bold]?"
    status, out, err = cosup("generate", fields["output"], question, "--max-new-tokens", "4")
    assert status == 0, err
    assert question in out


def test_damaged_weights_are_refused_before_they_answer(cosup, fields, arguments):
    assert cosup("train", *arguments())[0] == 0
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


def test_output_folders_are_checked_before_the_work(cosup, fields, tmp_path, monkeypatch, arguments):
    assert cosup("train", *arguments())[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    monkeypatch.setattr("cosup_fast.index.SequenceIndex.build", None)  # the work
    status, _, err = cosup("index", "build", fields["output"], "--output", tmp_path / "mine")
    assert (status, "holds something else" in err) == (1, True)
    status, _, err = cosup("evaluate", fields["output"], "--output", tmp_path / "mine")
    assert (status, "holds something else" in err) == (1, True)


def test_checking_nothing_is_no_success(cosup, tmp_path, monkeypatch):
    monkeypatch.setenv("COSUP_HOME", str(tmp_path))
    status, _, err = cosup("data", "check")
    assert (status, "nothing is prepared yet" in err) == (1, True)


def test_a_corpus_is_checked_without_examples(cosup, data_folder):
    status, _, err = cosup("data", "check", "--corpus", "/nosuch")
    assert (status, "corpus '/nosuch': expected a JSONL file" in err) == (1, True)
    status, out, err = cosup("data", "check", "--corpus", data_folder / "passages.jsonl")
    assert (status, "11 passages" in out + err) == (0, True)


def test_a_missing_package_is_named_with_its_remedy(cosup, fields, monkeypatch, arguments):
    assert cosup("train", *arguments())[0] == 0
    monkeypatch.setitem(sys.modules, "faiss", None)
    command = ["index", "build", fields["output"], "--corpus", fields["data.corpus"]]
    status, _, err = cosup(*command, "--factory", "HNSW8")
    assert (status, "pip install 'cosup-fast[index]'" in err) == (1, True)
    assert cosup(*command)[0] == 0  # torch searches as exactly
