"""Damaged files and wrong command lines: one line says what is wrong and names the file or the argument, no trace.

COSUP_FUZZ=3 pytest -m slow tests/faults/test_fuzz.py does three times as much, from the seed COSUP_FUZZ_SEED; a busy
machine needs more than the COSUP_FUZZ_SECONDS=20 for an input.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import socket
import time
import traceback
from pathlib import Path

import pytest

from cosup_fast.terminal import visible

SIZE = float(os.environ.get("COSUP_FUZZ", "1"))
SEED = int(os.environ.get("COSUP_FUZZ_SEED", "0"))
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of Linux")
SECONDS = float(os.environ.get("COSUP_FUZZ_SECONDS", "20"))
"""Nothing that is refused takes longer on a machine that does nothing else."""


@pytest.fixture(autouse=True)
def bounded():
    """As much memory as this process has, and 4 GiB: a damaged configuration may ask for more than any machine has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def verdict(cosup, arguments: list[str], names: tuple[str, ...]) -> str:
    """What is wrong with how a command ends; nothing when it is well, or says in a line what it does not accept."""
    started = time.monotonic()
    try:
        status, out, err = cosup(*arguments)
    except BaseException:
        return "".join(traceback.format_exc().splitlines(keepends=True)[-6:])
    said = out + err
    if "Traceback (most" in said or "Either a file is damaged" in err:
        return f"no message of its own: {err[-600:]}"
    if (took := time.monotonic() - started) > SECONDS:
        return f"{took:.0f} s: {err[-300:]}"
    if status not in (0, 1, 2, 130):
        return f"status {status}: {err[-300:]}"
    if any(ord(c) < 32 and c not in "\n\t" for c in said):
        return f"control characters: {said!r:.300}"
    if status and not any(name in said for name in names):
        return f"names neither {names[0]} nor another of the file's names: {said[-500:]}"
    return ""


MODEL = (
    "train run.yaml --force output=new training.steps=1 data.dev=[] training.keep_best=null training.eval_every=null"
)
READERS = {
    # file in the world: how many inputs, and the commands that read it, one of which is drawn for each
    "passages.jsonl": (
        70,
        ["data check examples.jsonl --corpus passages.jsonl", "index build run --corpus passages.jsonl --output new"],
    ),
    "examples.jsonl": (
        90,
        [
            "data check examples.jsonl --corpus passages.jsonl",
            "evaluate run --examples examples.jsonl --system closed-book --fluency none --output new",
        ],
    ),
    "more.jsonl": (30, ["index add run more.jsonl"]),
    "nq-dev-kilt.jsonl": (
        70,
        [
            "data convert kilt nq-dev-kilt.jsonl --output new",
            "evaluate run --examples nq-dev-kilt.jsonl --system closed-book --fluency none --output new",
        ],
    ),
    "knowledge.jsonl": (40, ["data convert kilt nq-dev-kilt.jsonl --knowledge knowledge.jsonl --output new"]),
    "self-rag.jsonl": (50, ["data convert self-rag self-rag.jsonl --output new"]),
    "kilt/converted.json": (20, ["data convert kilt nq-dev-kilt.jsonl --output kilt"]),
    "questions.jsonl": (40, ["generate run --file questions.jsonl --max-retrievals 0"]),
    "ids.txt": (15, ["index delete run --ids-file ids.txt"]),
    "run.yaml": (80, ["train run.yaml --show", "train run.yaml --resume"]),
    "run/config.yaml": (30, ["generate run Where?", "train run.yaml --resume"]),
    "study.yaml": (60, ["study study.yaml --status", "study study.yaml --report"]),
    "study/cells/one-seed0.json": (40, ["study study.yaml --report", "study study.yaml --status", "study study.yaml"]),
    "model/config.json": (70, [MODEL]),
    "model/tokenizer.json": (40, [MODEL]),
    "model/tokenizer_config.json": (30, [MODEL]),
    "model/generation_config.json": (15, [MODEL]),
    "model/model.safetensors": (15, [MODEL]),
    "run/index/index.json": (50, ["index info run", "index search run Where?", "index delete run rome"]),
    "run/index/shard-00000/shard.json": (20, ["index info run --verify", "index search run Where?"]),
    "run/index/shard-00000/passages.jsonl": (15, ["index search run Where?", "index info run --verify"]),
    "run/index/shard-00000/rows.npy": (15, ["index search run Where?"]),
    "run/index/shard-00000/vectors.npy": (15, ["index search run Where?"]),
    "run/index/approximate-0.faiss": (15, ["index search run Where? --engine approximate"]),
    "run/evaluation/co-supervised/answers.jsonl": (30, ["evaluate run --examples examples.jsonl --fluency none"]),
    "run/evaluation/co-supervised/verdicts.jsonl": (30, ["evaluate run --examples examples.jsonl --fluency none"]),
    "run/evaluation/co-supervised/report.json": (
        60,
        ["compare run/evaluation/co-supervised run/evaluation/co-supervised"],
    ),
    "run/metrics.jsonl": (50, ["train run.yaml --resume training.steps=3", "export run new"]),
    "run/data.json": (15, ["train run.yaml --resume training.steps=3"]),
    "run/checkpoints/best.json": (20, ["generate run Where? --max-retrievals 0"]),
    "run/checkpoints/step-000002/manifest.json": (
        40,
        ["generate run/checkpoints/step-000002 Where? --max-retrievals 0", "train run.yaml --resume training.steps=3"],
    ),
    "run/checkpoints/step-000002/cosup.json": (40, ["generate bare Where? --max-retrievals 0"]),
    "run/checkpoints/step-000002/gen/config.json": (25, ["generate bare Where? --max-retrievals 0"]),
    "run/checkpoints/step-000002/gen/tokenizer.json": (10, ["generate bare Where? --max-retrievals 0"]),
    "run/checkpoints/step-000002/heads.safetensors": (10, ["generate bare Where? --max-retrievals 0"]),
    "run/checkpoints/step-000002/trainer.json": (30, ["train run.yaml --resume training.steps=3"]),
    "adapted/checkpoints/step-000002/gen/adapter_config.json": (25, ["generate bare Where? --max-retrievals 0"]),
    "adapted/checkpoints/step-000002/cosup.json": (20, ["generate bare Where? --max-retrievals 0"]),
}
ASIDE = {
    "run/config.yaml": ("config.yaml", "run.yaml", "--resume"),
    "run.yaml": (
        "run.yaml",
        "'smollm2-135m'",
        "training.",
        "model.",
        "data.",
        "generation.",
        "'model'",
        "passages",
        "examples",
    ),
    "model/config.json": ("'model'", "model ", "model/", "model.", "training.", "example ", "passage "),
    "model/tokenizer.json": ("'model'", "model ", "model/", "tokenizer", "example ", "passage "),
    "model/tokenizer_config.json": ("'model'", "model ", "model/", "tokenizer", "example ", "passage "),
    "passages.jsonl": ("passages.jsonl", "examples.jsonl", "passage '"),
    "study.yaml": ("study.yaml", "condition", "the study now says"),
}
"""What else may be named where a file is damaged, such as another one that no longer agrees with it."""


def _without_checksum(content: bytes) -> bytes:
    """A file of one object without the checksum that would refuse every change."""
    return re.sub(rb', "crc32": "\w+"}\n\Z', b"}\n", content) if content.count(b'"crc32"') == 1 else content


def _without_manifest(place: Path, path: str) -> None:
    """Takes the checksums away that would refuse every change of a checkpoint."""
    checkpoint = place / "/".join(path.split("/")[:3])
    shutil.copytree(checkpoint, place / "bare")
    (place / "bare" / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_in_a_line(name, cosup, scratch, damaged, monkeypatch):
    count, commands = READERS[name]
    dice = random.Random(f"{SEED} {name}")
    wrong, place = [], scratch()
    original = _without_checksum((place / name).read_bytes())
    for number in range(max(1, round(count * SIZE))):
        place = scratch()
        # A configuration that lost the name of its model asks for the default one, which this home does not have.
        monkeypatch.setenv("COSUP_HOME", str(place / "home"))
        command = dice.choice(commands)
        path = place / name
        path.write_bytes(original)
        content = damaged(path, dice)
        if content == original:
            continue
        path.write_bytes(content)
        if "bare" in command:
            _without_manifest(place, name)
        names = (*ASIDE.get(name, ()), path.name, str(Path(name).parent) if "/" in name else path.name, "bare")
        if found := verdict(cosup, command.split(), names):
            wrong.append(f"input {number}: {command}\n{_difference(original, content)}\n{found}\n")
    assert not wrong, f"{len(wrong)} of {count}\n" + "\n".join(wrong[:12])


def _difference(before: bytes, now: bytes) -> str:
    start = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    return f"at byte {start} of {len(before)}: {now[max(0, start - 40) : start + 60]!r} ({len(now)} bytes)"


COMMANDS = (
    MODEL,
    "generate run Where? --max-retrievals 1 --max-new-tokens 2 --temperature 0.5 --top-p 0.9",
    "generate run --file questions.jsonl --output answers.new --json --stop x --device cpu",
    "evaluate run --examples examples.jsonl --limit 1 --fluency none --judge none --output new",
    "evaluate run --examples examples.jsonl --system bm25 --corpus passages.jsonl --fluency none --in-domain cities",
    "compare run/evaluation/co-supervised run/evaluation/co-supervised --metric grounded",
    "index build run --corpus passages.jsonl --output new --shard-size 4 --precision bfloat16",
    "index add run more.jsonl --index run/index --batch-tokens 64",
    "index delete run rome --ids-file ids.txt",
    "index search run Where? --index run/index -k 2 --engine torch",
    "index info run --verify",
    "export run new --what embseq --license mit --name x",
    "mine run --examples examples.jsonl --output mined.jsonl --depth 4 --max-score 0.9",
    "data check examples.jsonl --corpus passages.jsonl --allow-no-retrieval",
    "data convert kilt nq-dev-kilt.jsonl --knowledge knowledge.jsonl --output new --gold page",
    "data convert self-rag self-rag.jsonl --output new --skip-malformed",
    "data prepare nothing",
    "study study.yaml --status --only one-seed0",
    "study study.yaml --report --output study",
    "serve run --port 0 --host 127.0.0.1 --max-retrievals 1 --batch 2",
    "plan --preset nothing --gpus 2 --gpu-memory 80 --nsp-batch 4",
    "env --imports",
    "train run.yaml --show training.lr=1e-4 nsp.temperature=0.1",
)
ARGUMENTS = (
    "", " ", "-1", "0", "1e400", "nan", "inf", "99999999999999999999", "..", "run.yaml/x", "\x1b]52;c;aGk=\x07",
    "[/bold]", "[", "{", "null", "x" * 5000, "é" * 300, "\udcff", "--nosuch", "-z", "--", "training.nosuch=1", "=",
    "socket", "training.lr=[", "model.gen=", "model.gen=\udcff", "nsp=1", "output=run.yaml", "text.prompt={x}",
    "data.train=[..]", "/proc/nosuch/x",
)  # fmt: skip


def wrong(line: str, dice: random.Random) -> list[str]:
    """A command line with one to three words replaced, left out, repeated, misspelt or put in."""
    words = line.split()
    fixed = 2 if words[0] in ("data", "index") else 1
    for _ in range(dice.choice((1, 1, 2, 3))):
        at = dice.randrange(fixed, len(words) + 1)
        kind = dice.randrange(5)
        if kind == 0 or at == len(words):
            words.insert(at, dice.choice(ARGUMENTS))
        elif kind == 1:
            words[at] = dice.choice(ARGUMENTS)
        elif kind == 2:
            del words[at]
        elif kind == 3:
            words.insert(at, words[at])
        else:
            cut = dice.randrange(len(words[at]) + 1)
            words[at] = words[at][:cut] + dice.choice("aZ0-=.") + words[at][cut + 1 :]
    return words


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wrong_command_line_is_told_what_is_wrong(cosup, scratch, monkeypatch):
    dice, failed = random.Random(f"{SEED} commands"), []
    monkeypatch.setattr("cosup_fast.serve.server.serve_on", lambda *given: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    count = max(1, round(300 * SIZE))
    for number in range(count):
        place = scratch()
        monkeypatch.setenv("COSUP_HOME", str(place / "home"))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket")
        words = wrong(dice.choice(COMMANDS), dice)
        if words[:2] == ["env", "--imports"]:
            words.remove("--imports")
        known = [
            visible(part) for word in words for part in (word, *word.split("=", 1), word.lstrip("-")) if len(part) > 1
        ]
        # A folder without a name is the one here.
        letters = [form.format(word or ".") for word in words if len(word) < 2 for form in ("{}: ", ": {} is ")]
        said = ("the question", "no question", "output='run'", "'wiki-leads'")  # no word of its own, and defaults
        names = (*(part[:40] for part in known), *letters, *said, "Missing", "Usage", *words[:1])
        if found := verdict(cosup, words, names):
            failed.append(f"line {number}: {words!r:.400}\n{found}\n")
    assert not failed, f"{len(failed)} of {count}\n" + "\n".join(failed[:12])
