"""Worlds of real processes over gloo, started once, that tests send work to."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.variants import VARIANTS

SIZE = 8


class World:
    """`size` ranks that run functions of worker.py."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        # torch and transformers are imported once, by the server.
        context.set_forkserver_preload(["torch", "cosup_fast.training.trainer"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            given = {"RANK": rank, "SIZE": size, "PORT": port, "PIPE": theirs}
            path = str(Path(__file__).with_name("worker.py"))
            process = context.Process(target=runpy.run_path, args=(path, given, "worker"), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for rank in range(size):
            self._receive(rank)

    def _receive(self, rank: int, timeout: float = 120) -> Any:
        if not self.pipes[rank].poll(timeout):
            raise TimeoutError(f"rank {rank} does not answer")
        return self.pipes[rank].recv()

    def run(self, function: str, parts: list, *arguments: Any, size: int | None = None, **options: Any) -> list:
        """The results of function(size, part, ...) on the first len(parts) ranks."""
        size = len(parts) if size is None else size
        for pipe, part in zip(self.pipes, parts):
            pipe.send((function, (size, part, *arguments), options))
        answers = [self._receive(rank) for rank in range(len(parts))]
        if errors := [text for ok, text in answers if not ok]:
            raise AssertionError("\n".join(errors))
        return [result for _, result in answers]

    def send(self, function: str, *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, arguments, {}))

    def answer(self, rank: int, timeout: float) -> Any:
        ok, result = self._receive(rank, timeout)
        assert ok, result
        return result

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(SIZE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def small_world() -> Iterator[World]:
    made = World(4)
    yield made
    made.close()


@pytest.fixture
def make_world() -> Iterator[Any]:
    made: list[World] = []

    def make(size: int) -> World:
        made.append(World(size))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def settings(llama_folder, gpt2_folder):
    """A function that writes the settings of a variant as text."""

    def write(variant: str, dtype: str = "float64") -> str:
        model = {"gen": llama_folder, "dtype": dtype, **VARIANTS[variant].get("model", {})}
        model = {key: gpt2_folder if value == "gpt2" else value for key, value in model.items()}
        return json.dumps({**VARIANTS[variant], "model": model})

    return write


@pytest.fixture(scope="module")
def step_examples(mixed):
    """Passages asked for on several ranks, hard negatives, further gold ones, an example without [NSP]."""
    *most, three = mixed
    return [
        *most,
        three.model_copy(update={"negatives": ["seine", "go"]}),
        most[0].model_copy(update={"id": "again"}),
    ]
