"""What does it cost to answer over HTTP? The server beside the same decoder offline, and clients that crowd or vanish.

    python benchmarks/serving.py                       # prints a table
    python benchmarks/serving.py --rounds 5 --output benchmarks/results/...
    python benchmarks/serving.py --gen FOLDER --corpus FILE.jsonl --tokens 6 --crowd 20 --rounds 1    # a small one

SmolLM2-135M as it comes, made to retrieve first, over Wikipedia leads with random vectors. Offline and served batches
take turns in every round and must write the same text. Ratios are medians over the rounds, with least and most.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a file

from benchmarks.serving_clients import Reply, ask  # noqa: E402

if TYPE_CHECKING:
    from cosup_fast.generation import Generator
    from cosup_fast.serve.engine import Engine

CLIENTS = 16


@dataclass(frozen=True)
class Size:
    """How much is asked."""

    gen: str = "smollm2-135m"
    corpus: str = "wiki-leads"
    passages: int = 400
    tokens: int = 36
    """Of each answer; those that run beside a late one have four times as many."""
    crowd: int = 200
    """Clients at once; half as many vanish."""


def body(number: int, tokens: int) -> dict[str, Any]:
    """The request of one client."""
    return {
        "model": "co-supervised",
        "messages": [{"role": "user", "content": f"Which river flows through the city number {number}?"}],
        "max_tokens": tokens,
        "ret_first": True,
        "max_retrievals": 1,
    }


class Server:
    """A running server and what is measured of it."""

    def __init__(self, url: str, engine: Engine, generator: Generator, size: Size):
        self._url, self._engine, self._generator, self._size = url, engine, generator, size

    def offline(self) -> tuple[float, int, list[str]]:
        """Seconds, forwards and texts of a batch of `CLIENTS` without a server."""
        from cosup_fast.generation import Request

        began = time.perf_counter()
        decoder = self._generator.decoder(CLIENTS)
        questions = [body(number, 1)["messages"][0]["content"] for number in range(CLIENTS)]
        tickets = [decoder.submit(Request(question)) for question in questions]
        forwards = 0
        while not decoder.idle:
            decoder.step()
            forwards += 1
        return time.perf_counter() - began, forwards, [ticket.result().text for ticket in tickets]

    def served(self) -> tuple[float, int, list[str]]:
        """The same for `CLIENTS` clients at once."""
        before = self._forwards()
        replies = self.ask([body(number, self._size.tokens) for number in range(CLIENTS)])
        return max(reply.seconds for reply in replies), self._forwards() - before, [reply.text for reply in replies]

    def late(self) -> float:
        """Seconds to the first text of a request that arrives while 15 write, less alone, in steps of those 15."""
        (alone,) = self.ask([body(99, 2)])
        *others, late = self.ask([body(n, 4 * self._size.tokens) for n in range(15)], late=body(99, 2))
        first = late.start + late.times[0]
        if any(reply.start + reply.times[-1] < first for reply in others):
            raise RuntimeError("a request ended before the late one began to write: raise --tokens")
        gaps = [b - a for reply in others for a, b in pairwise(reply.times) if reply.start + b < late.start]
        return (late.times[0] - alone.times[0]) / mean(gaps)  # texts that are read together have no gap

    def ask(self, bodies: list[dict[str, Any]], **how: Any) -> list[Reply]:
        """The replies, once the engine is idle again."""
        replies = ask(self._url, bodies, **how)
        end = time.monotonic() + 120
        while self._engine.open:
            if time.monotonic() > end:
                raise RuntimeError(f"{self._engine.open} requests are still open after their clients left")
            time.sleep(0.02)
        return replies

    @property
    def free(self) -> int:
        """Places in the batch that nothing holds."""
        return self._engine.decoder.free

    def _forwards(self) -> int:
        return int(sum(bucket.get() for bucket in self._engine.metrics.step._buckets))


@contextmanager
def running(size: Size) -> Iterator[Server]:
    """A server, in a thread of this process."""
    import torch

    from cosup_fast.config.model import ModelConfig
    from cosup_fast.data.sources import load_corpus
    from cosup_fast.data.template import TextConfig
    from cosup_fast.generation import GenerationConfig, Generator
    from cosup_fast.index import SequenceIndex
    from cosup_fast.index.origin import Origin
    from cosup_fast.model import CoSupervisionModel
    from cosup_fast.serve.app import create_app
    from cosup_fast.serve.server import listen, serve_on
    from cosup_fast.serve.settings import ServeConfig
    from cosup_fast.serve.systems import offer

    text = TextConfig(max_passage_tokens=48, long_passages="truncate")
    model = CoSupervisionModel.from_pretrained(ModelConfig(gen=size.gen, embseq_layers=1), text).eval()
    passages = load_corpus(size.corpus)[: size.passages]
    vectors = torch.randn(len(passages), model.width, generator=torch.Generator().manual_seed(0))
    index = SequenceIndex(passages, vectors, Origin.of(model))
    config = GenerationConfig(max_new_tokens=size.tokens, ret_first=True, max_retrievals=1)
    generator = Generator(model, index, config, max_batch=CLIENTS)
    settings = ServeConfig(port=0, max_batch=CLIENTS, max_waiting=64, drain_seconds=1)
    app = create_app(generator, index, offer(model, index), config, settings)
    urls: list[str] = []
    servers: list[Any] = []
    listening = threading.Event()

    def on_listening(url: str) -> None:
        urls.append(url)
        listening.set()

    arguments = (app, settings, listen(settings), on_listening, servers.append)
    thread = threading.Thread(target=serve_on, args=arguments, daemon=True)
    thread.start()
    if not listening.wait(60):
        raise RuntimeError("the server did not start")
    try:
        yield Server(urls[0], app.state.service.engine, generator, size)
    finally:
        servers[0].should_exit = True
        thread.join(60)


def measure(server: Server, size: Size, rounds: int) -> list[tuple[str, str]]:
    """The rows of the table."""
    speed, forwards, late, same = [], [], [], True
    for number in range(rounds + 1):  # the first one warms up
        # Who goes first changes, so that neither is always the one after a rest.
        batches = [server.offline, server.served][:: 1 if number % 2 else -1]
        results = {batch.__name__: batch() for batch in batches}
        (alone, alone_forwards, expected), (seconds, served_forwards, texts) = results["offline"], results["served"]
        same &= texts == expected
        beside = server.late()
        if number:
            speed.append(alone / seconds)
            forwards.append(served_forwards / alone_forwards)
            late.append(beside)
    full = resident()
    crowd = server.ask([body(number, 4) for number in range(size.crowd)])
    statuses = Counter(reply.status for reply in crowd)
    after = resident()
    vanishing = size.crowd // 2
    for count in (vanishing - vanishing // 3, vanishing // 3):
        server.ask([body(number, 4 * size.tokens) for number in range(count)], vanish=True)
    return [
        (f"throughput of {CLIENTS} clients / of the offline batch of {CLIENTS}", spread(speed)),
        ("forwards of those clients / of the offline batch", spread(forwards)),
        ("the same text as offline, greedy", "yes" if same else "NO"),
        ("first text beside 15 others, less alone, in steps", spread(late)),
        (
            f"{size.crowd} clients at once, by status",
            ", ".join(f"{n} x {code}" for code, n in sorted(statuses.items())),
        ),
        (f"resident memory after those {size.crowd}, MiB more", f"{after - full:+.0f}"),
        (f"{vanishing} clients that vanish: places free afterwards", f"{server.free} of {CLIENTS}"),
        (f"resident memory after those {vanishing}, MiB more", f"{resident() - after:+.0f}"),
    ]


def resident() -> float:
    """MiB of this process in memory."""
    from benchmarks.memory import status

    return status("VmRSS") / 2**20


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    standard = Size()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of offline, served and late requests")
    parser.add_argument("--output", type=Path, help="folder for serving.md")
    for name, kind, what in (
        ("gen", str, "Gen and Embseq"),
        ("corpus", str, "passages"),
        ("tokens", int, "of each answer"),
        ("crowd", int, "clients at once; half as many vanish"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(standard, name), help=what)
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds {chosen.rounds}: expected at least 1")
    from benchmarks import machine, report

    size = Size(gen=chosen.gen, corpus=chosen.corpus, tokens=chosen.tokens, crowd=chosen.crowd)
    before = machine.load()
    with running(size) as server:
        rows = measure(server, size, chosen.rounds)
    command = shlex.join(["python", "benchmarks/serving.py", *(sys.argv[1:] if arguments is None else arguments)])
    waiting = os.environ.get("OMP_WAIT_POLICY", "unset")
    lines = [
        "# The server beside the same decoder offline",
        "",
        report.table("measured | median of the rounds (least to most)", [list(row) for row in rows]),
        "",
        f"`{command}`, {chosen.rounds} rounds (load before: {before}; OMP_WAIT_POLICY {waiting})",
        "",
        machine.line(),
    ]
    print("\n".join(lines))
    if chosen.output:
        report.write(chosen.output, {"serving.md": "\n".join(lines) + "\n"})


if __name__ == "__main__":
    main()
