"""Builds an index in forked processes that are killed at every moment, or that share the work; run by test_build.py.

python processes.py kill CHECKPOINT CORPUS FOLDER    prints what was killed how often
python processes.py ranks CHECKPOINT CORPUS FOLDER        by two ranks
python processes.py lost CHECKPOINT CORPUS FOLDER         by two ranks, one of which is slow or lost, in each way
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from cosup_fast.data.records import Passage
from cosup_fast.distributed import PeerError, joined_ranks
from cosup_fast.index import Options, SequenceIndex
from cosup_fast.index import build as build_module
from cosup_fast.model import CoSupervisionModel

OPTIONS = Options(shard_size=4, progress=False)


def forked(work) -> int:
    """The exit status of a child that does some work, negative for a signal, 1 for an error."""
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(calls: int):
    """Makes this process kill itself before its n-th flush or rename of a file."""
    left = [calls]
    for name in ("fsync", "replace", "rename", "unlink"):
        original = getattr(os, name)

        def counted(*arguments, original=original, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, name, counted)


def kill(model, corpus: str, folder: Path) -> None:
    """Kills builds, additions and deletions, each at another moment, and does each of them again.

    Whatever is there after a kill is whole, no finished shard is embedded again, and the end is the same to the bit.
    """
    new = [Passage(id=f"new{i}", title="", text=f"number {i}") for i in range(6)]

    def build():
        SequenceIndex.build(model, corpus, folder, options=OPTIONS)

    def add():
        SequenceIndex.load(folder, model).add(model, new, options=OPTIONS)

    def delete():
        SequenceIndex.load(folder, model).delete(["paris", "long", "new0"])

    for work, other in ((build, ".index.building"), (add, ".index.adding"), (delete, ".none")):
        before = folder.with_name("before")
        if folder.exists():
            folder.rename(before)
        expected, calls, start = None, 0, digest(model, before) if before.exists() else None
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            if before.exists():
                shutil.copytree(before, folder)
            if forked(lambda: (killed_after(calls), work())) == 0:  # noqa: B023
                break
            state = digest(model, folder) if folder.exists() else None
            finished = len(list(folder.with_name(other).glob("shard-*/shard.json")))
            if state == start:
                total = {build: 3, add: 2, delete: 0}[work]
                assert forked(lambda: embedding(total - finished, work)) == 0, (work.__name__, calls)  # noqa: B023
            elif work is add:  # it was killed after it counted
                assert forked(work) == 1
            left = sorted(os.listdir(folder.parent))
            assert left == ["before", "index"][not before.exists() :], (work.__name__, calls, left)
            expected = expected or digest(model, folder)
            assert digest(model, folder) == expected, (work.__name__, calls)
            calls += 11
        shutil.rmtree(before, ignore_errors=True)
        print(work.__name__, calls // 11)


def digest(model, folder: Path):
    """What an index holds."""
    index = SequenceIndex.load(folder, model)
    return index.embeddings.numpy().tobytes(), list(index.passages)


def embedding(expected: int, work) -> None:
    """Does some work and counts the shards that are embedded."""
    embed, embedded = build_module.embed_sequences, []
    build_module.embed_sequences = lambda *a, **k: embedded.append(1) or embed(*a, **k)
    work()
    assert len(embedded) == expected, (len(embedded), expected)


def ranks(model, corpus: str, folder: Path, last: str = "works") -> int:
    """The status of a build by two ranks, which have two shards and one to embed; errors are printed.

    Rank 1 "works" or, within a timeout of 2 s, is "slow", "hangs", "dies" or is "absent".
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    timeout = 60 if last == "works" else 2
    options = Options(shard_size=4, progress=False, rank_timeout=timeout)
    embed = build_module.embed_sequences
    children = []
    for rank in range(1 if last == "absent" else 2):
        if (child := os.fork()) == 0:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            if rank == 1:
                build_module.embed_sequences = lambda *a, **k: BEHAVIOUR[last](k["on_pack"]) or embed(*a, **k)
            status = 0
            try:
                with joined_ranks(timeout=timeout):
                    assert dist.get_world_size() == 2
                    embedding(2 - rank, lambda: SequenceIndex.build(model, corpus, folder, options=options))
            except (ValueError, PeerError) as error:
                print(f"rank {rank}: {error}", flush=True)
                status = 3
            os._exit(status)
        children.append(child)
    statuses = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children[: 1 if last in LOST else None]}
    if last == "hangs":
        os.kill(children[-1], signal.SIGKILL)
    assert len(statuses) == 1, statuses
    return statuses.pop()


def _slow(on_pack) -> None:
    for _ in range(8):
        time.sleep(0.5)
        on_pack(0)


LOST = {"hangs", "dies", "absent"}
BEHAVIOUR = {
    "works": lambda on_pack: None,
    "slow": _slow,
    "hangs": lambda on_pack: time.sleep(600),
    "dies": lambda on_pack: os.kill(os.getpid(), signal.SIGKILL),
}


def main() -> None:
    torch.set_num_threads(1)
    what, checkpoint, corpus, folder = sys.argv[1:]
    model = CoSupervisionModel.load(checkpoint).eval()
    if what == "kill":
        kill(model, corpus, Path(folder))
    elif what == "ranks":
        sys.exit(ranks(model, corpus, Path(folder)))
    else:
        for last in ("slow", *sorted(LOST)):
            print(last, ranks(model, corpus, Path(folder) / last, last), flush=True)


if __name__ == "__main__":
    main()
