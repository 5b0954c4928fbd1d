"""`evaluate` and `generate` from the command line: systems, settings, files of questions, and what they refuse."""

from __future__ import annotations

import io
import json

import pytest

from cosup_fast.cli.systems import clear
from cosup_fast.files import Journal


def test_plain_questions_can_be_evaluated(cosup, fields, data_folder, tmp_path, arguments):
    assert cosup("train", *arguments(**{"training.steps": 1}))[0] == 0
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


def test_every_system_answers_the_same_questions_and_is_compared(cosup, data_folder, tmp_path, arguments):
    for name in ("run", "other"):
        changes = {"output": tmp_path / name, "training.steps": 1, "generation.max_new_tokens": 4}
        assert cosup("train", *arguments(**changes))[0] == 0
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


def test_evaluations_that_cannot_run_are_named(cosup, fields, data_folder, tmp_path, arguments):
    assert cosup("train", *arguments(**{"training.steps": 1}))[0] == 0
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


def test_generation_follows_the_runs_configuration_and_options_override_it(cosup, fields, data_folder, arguments):
    settings = {"generation.ret_first": "true", "generation.max_new_tokens": 3, "generation.max_retrievals": 1}
    assert cosup("train", *arguments(**settings))[0] == 0
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


def test_many_questions_from_files(cosup, fields, data_folder, tmp_path, monkeypatch, arguments):
    settings = {"generation.ret_first": "true", "generation.max_new_tokens": 4, "generation.max_retrievals": 1}
    assert cosup("train", *arguments(**settings))[0] == 0
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


def test_what_was_answered_before_an_interruption_is_kept(cosup, fields, data_folder, tmp_path, monkeypatch, arguments):
    settings = {"generation.max_new_tokens": 3, "generation.max_retrievals": 0}
    assert cosup("train", *arguments(**settings))[0] == 0
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


def test_overwriting_removes_an_evaluation_alone(tmp_path):
    (tmp_path / "report.json").write_text("years of work")
    clear(tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"question": "Who?", "answer": "They."}')  # as of `generate --output`
    with pytest.raises(ValueError, match=r"answers\.jsonl is not a journal of this work"):
        clear(tmp_path)
    assert (tmp_path / "report.json").read_text() == "years of work"
    (tmp_path / "answers.jsonl").unlink()
    with Journal(tmp_path / "answers.jsonl", {"of": "it"}) as journal:
        journal.add("e1", {})
        with pytest.raises(ValueError, match="is being written by another process"):
            clear(tmp_path)
        journal.add("e2", {})
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    (tmp_path / "notes.txt").write_text("of ours")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
