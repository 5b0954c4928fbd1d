"""What the README and the docs show: their Python runs, their commands are understood, their links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import typer.main

from cosup_fast.cli.app import app
from cosup_fast.data.records import Example, Passage, write_jsonl
from cosup_fast.functional import info_nce
from cosup_fast.index import SequenceIndex

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
}
HERE = "tests/project/test_snippets.py"
RUN_IN = {
    "README.md": HERE,
    "docs/data.md": HERE,
    "docs/evaluation.md": HERE,
    "docs/generation.md": HERE,
    "docs/index.md": HERE,
    "docs/migration.md": "tests/project/test_migration.py",
    "docs/negatives.md": HERE,
    "docs/serving.md": "tests/serve/test_serving_docs.py",
    "docs/testing-without-a-gpu.md": "tests/testing/test_testing_docs.py",
    "docs/training.md": HERE,
}
"""Where the Python of each page runs; a page that is not listed has none. Other languages are data or output."""


def blocks(page: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def run(page: str, **names: Any) -> dict[str, Any]:
    """Runs the Python of a page, block after block, with some names given."""
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


def test_the_python_of_every_page_runs_somewhere():
    assert {page for page in PAGES if blocks(page, "python")} == set(RUN_IN)
    for page, test in RUN_IN.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not name {page}"
    languages = {language for text in PAGES.values() for language in re.findall(r"^```(\w+)$", text, re.MULTILINE)}
    assert languages <= {"python", "json", "mermaid", "yaml"}


def test_readme():
    names = run("README.md")
    assert float(names["out"].loss.detach()) > 0


def test_index():
    names = run("docs/index.md")
    assert names["query"].grad.isfinite().all()


def test_data(examples, passages):
    names = {"train": examples[:1], "dev": [], "test": examples[2:3], "corpus": passages}
    from cosup_fast.data.prepared.splits import check_splits

    run("docs/data.md", check_splits=check_splits, **names)
    with pytest.raises(ValueError, match="train"):
        run("docs/data.md", check_splits=check_splits, **names | {"dev": examples[:1]})


def test_negatives(tmp_path):
    import torch

    from cosup_fast.losses import InfoNCELoss

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        names = {"query": torch.randn(3, 5, requires_grad=True), "keys": torch.randn(4, 5), "ids": torch.arange(4)}
        share = run("docs/negatives.md", torch=torch, InfoNCELoss=InfoNCELoss, **names)["share"]
    finally:
        dist.destroy_process_group()
    expected = info_nce(names["query"], names["keys"], key_ids=names["ids"], scale=20, normalize=True)
    torch.testing.assert_close(share, expected)


def test_generation(model, passages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model.save(tmp_path / "runs/first/checkpoints/step-000030")
    SequenceIndex.build(model, passages, tmp_path / "runs/first/index", progress=False)
    names = run("docs/generation.md", questions=["Where is Rome?", "What is Go?"])
    assert names["answer"].error is None
    assert [answer.error for answer in names["answers"]] == [None, None]
    assert "Who wrote Hamlet?" in capsys.readouterr().out


def test_evaluation(model, passages, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = {"id": "a", "input": "Where is Rome?", "output": [{"answer": "Italy", "provenance": [{"title": "Rome"}]}]}
    (tmp_path / "nq-dev-kilt.jsonl").write_text(json.dumps(line) + "\n")
    write_jsonl(tmp_path / "mine.jsonl", examples[:1])
    articles = [Passage(id=f"n{i}", title=f"Article {i}", text=f"News of day {i}.") for i in range(5)]
    news = [
        Example(id="n", dataset="news", question="What was new on day 3?", output=[], answers=["News"], gold=["n3"])
    ]
    index = SequenceIndex.build(model, passages, progress=False)
    names = run(
        "docs/evaluation.md",
        model=model, index=index, leads=passages, articles=articles, nq=examples[:1], news=news, other_model=model,
    )  # fmt: skip
    assert len(names["rows"]) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"closed-book", "gold", "bm25", "pair-nsp-only"}


def test_training(llama_folder, data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = str(data_folder / "examples.jsonl")
    data = {"corpus": str(data_folder / "passages.jsonl"), "train": [examples], "dev": [examples], "allow_leaks": True}
    steps = {"batch_size": 2, "steps": 2, "eval_every": 2, "checkpoint_every": 2}
    config = {"output": str(tmp_path / "run"), "model": {"gen": llama_folder}, "data": data, "training": steps}
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    run("docs/training.md")
    assert re.search(r"^step 2: R@5 \d+\.\d%$", capsys.readouterr().out, re.MULTILINE)


def understood(words: list[str]) -> None:
    """Parses the words of a command line down to its options, without running it."""
    command, context = typer.main.get_command(app), typer.Context(typer.main.get_command(app), info_name="cosup-fast")
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command = command.commands[words[0]]
        context = typer.Context(command, info_name=words[0], parent=context)
        words = words[1:]
    command.parse_args(context, list(words))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page, monkeypatch):
    """cosup-fast, also under torchrun or python -m, to its options; make to its targets; python -m to its module."""
    monkeypatch.setattr("cosup_fast.data.sources.resolve_checkpoint", lambda folder: folder)  # none need be prepared
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    for line in text.splitlines():
        words = (
            shlex.split(re.split(r" #|   ", line)[0]) if re.match(r"(cosup-fast|torchrun|make|python) ", line) else []
        )
        if not words:
            continue
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), line
        elif words[0] == "cosup-fast":
            understood(words[1:])
        else:
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module) is not None or (ROOT / module).is_dir(), line
            if module == "cosup_fast":
                understood(words[words.index("-m") + 2 :])


def test_the_readme_shows_commands():
    assert len(re.findall(r"^cosup-fast ", PAGES["README.md"], re.MULTILINE)) >= 5


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(((?!http)[^)#\s]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
