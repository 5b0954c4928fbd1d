"""Commands in forked processes that are stopped at random moments and run again until they end; run by test_kills.py.

python kills.py WORLD PLACE COUNT SEED

WORLD is a folder with everything that commands read, PLACE a new one for copies of it. Half of the COUNT stops are
SIGTERM, half SIGKILL. After each of them whatever has its final name is whole; at the end of each command its result is
that of a run which nobody stopped. Prints how often each command was stopped, and how often it went on to its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cosup_fast.cli.app import run
from cosup_fast.index import SequenceIndex
from cosup_fast.training.checkpoint import checkpoints, verify
from cosup_fast.training.log import read_metrics


def _weights(folder: str) -> Callable[[Path], object]:
    def digest(place: Path) -> object:
        last = checkpoints(place / folder / "checkpoints")[-1]
        files = [path for path in sorted(last.rglob("*.safetensors")) if "optimizer" not in path.parts]
        losses = [(r["step"], r["loss"]) for r in read_metrics(place / folder / "metrics.jsonl") if r["kind"] == "step"]
        return last.name, losses, [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    return digest


def _index(folder: str) -> Callable[[Path], object]:
    def digest(place: Path) -> object:
        index = SequenceIndex.open(place / folder)
        return [passage.id for passage in index.passages], hashlib.sha256(
            index.embeddings.numpy().tobytes()
        ).hexdigest()

    return digest


def _files(*names: str) -> Callable[[Path], object]:
    def digest(place: Path) -> object:
        paths = [path for name in names for path in sorted([place / name, *(place / name).rglob("*")])]
        return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths if path.is_file()]

    return digest


def _questions(place: Path) -> object:
    return json.loads((place / "new" / "report.json").read_text())["questions"]


def _systems(place: Path) -> object:
    cells = sorted((place / "results" / "cells").glob("*.json"))
    return [(cell.name, json.loads(cell.read_text())["systems"]) for cell in cells]


COMMANDS: dict[str, Callable[[Path], object]] = {
    "train run.yaml --resume output=new training.steps=6 training.checkpoint_every=1": _weights("new"),
    "index build run --corpus passages.jsonl --output new --shard-size 2": _index("new"),
    "index add run more.jsonl": _index("run/index"),
    "index delete run rome go": _index("run/index"),
    "generate run --file questions.jsonl --output answers.new --batch 1": _files("answers.new"),
    "evaluate run --examples examples.jsonl --fluency none --batch 1 --output new": _questions,
    "mine run --examples examples.jsonl --output mined.jsonl": _files("mined.jsonl"),
    "export run new": _files("new"),
    "data convert kilt nq-dev-kilt.jsonl --knowledge knowledge.jsonl --output new": _files("new"),
    "data convert self-rag self-rag.jsonl --output new": _files("new"),
    "study study.yaml --output results": _systems,
}


def started(command: str, place: Path) -> int:
    """The process of a command that runs in a folder."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.chdir(place)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(os.open(place / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.argv = ["cosup-fast", *command.split()]
        run()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_whole(place: Path) -> None:
    """Whatever has its final name is whole."""
    for manifest in place.glob("*/checkpoints/step-*/manifest.json"):
        verify(manifest.parent)
    for stamp in place.glob("**/index.json"):
        if not any(part.startswith(".") for part in stamp.relative_to(place).parts):
            SequenceIndex.open(stamp.parent, verify=True)
    for path in (*place.glob("**/report.json"), *place.glob("**/converted.json"), *place.glob("**/export.json")):
        if not any(part.startswith(".") for part in path.relative_to(place).parts):
            json.loads(path.read_text())
    for name in ("answers.new", "mined.jsonl"):
        if (place / name).exists():
            assert all(json.loads(line) for line in (place / name).read_text().splitlines())


def renewed(world: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place, symlinks=True)
    return place


def over(status: int, place: Path) -> bool:
    """Whether a change of an index says that one which was killed had been made."""
    if status != 1:
        return False
    last = (place / "stderr").read_text().rstrip().rpartition("\n")[2]
    return "no passage has the id" in last or "in the index already" in last


def stopped(command: str, digest: Callable[[Path], object], world: Path, place: Path, count: int, seed: int) -> str:
    """Stops a command so many times, and compares what it ends with."""
    dice = random.Random(f"{seed} {command}")
    before = time.monotonic()
    assert ended(started(command, renewed(world, place))) == 0, (place / "stderr").read_text()[-2000:]
    duration, expected = time.monotonic() - before, digest(place)
    renewed(world, place)
    stops = finished = tries = 0
    while stops < count and tries < 3 * count + 5:
        tries += 1
        child, how = started(command, place), signal.SIGKILL if tries % 2 else signal.SIGTERM
        time.sleep(dice.random() * duration)
        os.kill(child, how)
        status = ended(child)
        done = status == 0 or over(status, place)
        assert done or status in (130, -how), (command, how, status, (place / "stderr").read_text()[-2000:])
        check_whole(place)
        stops += not done
        if done:
            assert digest(place) == expected, command
            finished += 1
            renewed(world, place)
    status = ended(started(command, place))
    assert status == 0 or over(status, place), (command, (place / "stderr").read_text()[-2000:])
    assert digest(place) == expected, command
    left = [path.name for path in place.rglob(".*.new")]
    assert not left, (command, left)
    return f"{command}: stopped {stops} times, ended {finished} times before it was"


def main() -> None:
    torch.set_num_threads(1)
    world, place, count, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for number, (command, digest) in enumerate(COMMANDS.items()):
        share = count // len(COMMANDS) + (number < count % len(COMMANDS))
        if share:
            print(stopped(command, digest, world, place / "copy", share, seed), flush=True)


if __name__ == "__main__":
    main()
