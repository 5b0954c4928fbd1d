"""Seeded damage to files: bytes, lines and JSON values that no writer would have written; and a folder to damage."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosup_fast.data.records import write_jsonl

WILD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3_000_000_000, 10**30, 1e308, float("nan"), float("inf"), "", " ", "x" * 5000, "/proc/nosuch",
    "../../etc/passwd", "\ud800", "\x1b]52;c;aGk=\x07", "{", "[bold]", "{x:>100000000}", [], {}, [[]], [None], ["x"],
    {"": None}, {"x": 1},
)  # fmt: skip
DEEP = 100_000


@pytest.fixture(scope="session")
def damaged():
    """A function that damages a file."""
    return _damaged


def _damaged(path: Path, dice: random.Random) -> bytes:
    """What a file could hold instead; JSON and JSONL more often keep their form than not."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and dice.random() < 0.7:
        lines = content.splitlines(keepends=True) if path.suffix == ".jsonl" else [content]
        number = dice.randrange(len(lines))
        lines[number] = _json(lines[number], dice)
        return b"".join(lines)
    return dice.choice((_flip, _truncate, _insert, _repeat, _replace))(content, dice)


def _flip(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 8))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def _insert(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) + 1)
    new = dice.choice((b"\xff", b"\x00", b"\n", b"\xef\xbb\xbf", b'"', b"{", b"]", b": ", b"  ", b"*a", b"\xed\xa0"))
    return content[:at] + new + content[at:]


def _repeat(content: bytes, dice: random.Random) -> bytes:
    start, stop = sorted(dice.randrange(len(content) + 1) for _ in range(2))
    return content[:stop] + content[start:stop] + content[stop:]


def _replace(content: bytes, dice: random.Random) -> bytes:
    opening = dice.choice((b"[", b'{"a":'))
    return dice.choice(
        (b"", b"\n\n", b"null", b"[]", b"{}", b"7", b'"text"', b"\xff\xfe", dice.randbytes(200), opening * DEEP)
    )


def _json(line: bytes, dice: random.Random) -> bytes:
    """JSON with one value changed, left out, or given twice."""
    data = json.loads(line)
    places = list(_places(data))
    holder, key = dice.choice(places) if places else (None, None)
    kind = dice.randrange(8)
    if holder is None or kind == 0:
        return json.dumps(dice.choice(WILD)).encode() + b"\n"
    if kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 3 and isinstance(holder, dict):
        holder["unknown"] = copy.deepcopy(holder[key])
    elif kind == 4:
        holder[key] = [holder[key]]
    elif kind == 5:
        other, name = dice.choice(places)
        holder[key] = copy.deepcopy(other[name])
    else:
        holder[key] = copy.deepcopy(dice.choice(WILD))
    return json.dumps(data).encode() + b"\n"


def _places(data: Any) -> Any:
    """Every (container, key) in a JSON value."""
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from _places(data[key])


@pytest.fixture(scope="session")
def world(tmp_path_factory, make_folder, passages, examples):
    """A folder with everything that commands read, made by them; tests change copies of it."""
    from cosup_fast.cli.app import run

    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)  # names are relative, so that a copy reads its own files
    shutil.copytree(make_folder("llama", tie_word_embeddings=False), "model")
    write_jsonl("passages.jsonl", passages)
    write_jsonl("examples.jsonl", examples[:3])
    write_jsonl("dev.jsonl", examples[3:])
    write_jsonl("more.jsonl", [passages[0].model_copy(update={"id": "new"})])
    page = {"_id": "1", "wikipedia_id": "1", "wikipedia_title": "Paris", "text": ["Paris", "Paris is a city.", "Old."]}
    Path("knowledge.jsonl").write_text(json.dumps(page) + "\n")
    source = {"wikipedia_id": "1", "title": "Paris", "start_paragraph_id": 1, "end_paragraph_id": 1}
    kilt = {"id": "q", "input": "Where?", "output": [{"answer": "Paris", "provenance": [source]}, {"answer": "here"}]}
    Path("nq-dev-kilt.jsonl").write_text(json.dumps(kilt) + "\n" + json.dumps({**kilt, "id": "r"}) + "\n")
    text = "Yes.[Retrieval]<paragraph>Paris\nParis is a city.</paragraph>[Relevant]It is.[Fully supported][Utility:5]"
    Path("self-rag.jsonl").write_text(json.dumps({"instruction": "Where?", "input": "", "output": text}) + "\n")
    Path("questions.jsonl").write_text('{"question": "Where?", "instruction": "", "id": 3}\n{"question": "Who?"}\n')
    Path("ids.txt").write_text("rome\nparis\n")
    config = {
        "output": "run",
        "model": {"gen": "model"},
        "data": {"corpus": "passages.jsonl", "train": ["examples.jsonl"], "dev": ["dev.jsonl"]},
        "training": {"batch_size": 2, "steps": 2, "eval_every": 1, "checkpoint_every": 1, "keep_best": "ntp"},
        "generation": {"max_new_tokens": 3, "max_retrievals": 1},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    study = {
        "output": "study",
        "base": {key: section for key, section in config.items() if key != "output"},
        "sets": [{"name": "cities", "examples": "examples.jsonl", "corpus": "passages.jsonl", "domain": "in-domain"}],
        "conditions": {"one": {"systems": ["closed-book"]}, "two": {"change": {"nsp.weight": 0}, "systems": ["gold"]}},
        "decisive": [{"title": "t", "metric": "correctness", "after": "two/gold", "before": "one/closed-book"}],
    }
    Path("study.yaml").write_text(yaml.safe_dump(study))
    for command in (
        "train run.yaml --force",  # whatever memory other processes leave
        "index build run --corpus passages.jsonl --factory IVF2,Flat",
        "evaluate run --examples examples.jsonl --fluency none",
        "generate run Where? --output answers.jsonl",
        "data convert kilt nq-dev-kilt.jsonl --output kilt",
        "train run.yaml --force model.gen_lora.rank=2 output=adapted",
        "study study.yaml",
    ):
        sys.argv = ["cosup-fast", *command.split()]
        with pytest.raises(SystemExit) as ended:
            run()
        assert not ended.value.code, command
    os.chdir(before)
    return folder


@pytest.fixture
def scratch(world, tmp_path, monkeypatch):
    """A function that makes this process's folder a new copy of the world, some levels down."""
    place = tmp_path / "some" / "levels" / "down"

    def renew() -> Path:
        shutil.rmtree(tmp_path / "some", ignore_errors=True)
        shutil.copytree(world, place, symlinks=True)
        os.chdir(place)
        return place

    yield renew
    os.chdir(tmp_path)
