"""Runs tasks until the time is up: each in a worker process, each result in a file of its own as soon as it is known.

A task that fails, takes too long or takes the process down with it leaves a result that says so, and the next one
follows in a new worker: after a CUDA error nothing more can run in the old one. What has a file is not run again.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.check import first_line
from cosup_fast.files import replace_file

STARTING = 60.0
"""Seconds that a worker may take to import torch and transformers."""


@dataclass(frozen=True)
class Setting:
    """On what a task runs, and how large it is."""

    device: str = "cuda"
    rehearse: bool = False

    def size(self, real: Any, rehearsed: Any) -> Any:
        """One of two sizes."""
        return rehearsed if self.rehearse else real


class AbsentError(Exception):
    """A task that cannot run here; the message names what is missing."""


@dataclass(frozen=True)
class Task:
    """One thing to find out."""

    name: str
    what: str
    run: Callable[[Setting, float], dict[str, Any]]
    """Given the seconds it may take; it keeps to them where it can."""
    seconds: float
    """After so many it is stopped."""
    least: float = 20.0
    """It is not begun with less time left."""


@dataclass
class Result:
    """What is known of a task."""

    task: str
    status: str  # ok, absent, failed
    seconds: float
    machine: str
    reason: str = ""
    trace: str = ""
    found: dict[str, Any] = field(default_factory=dict)


class Session:
    """The results in a folder, and the time that is left.

    Args:
        folder: of the results; made where it is missing.
        setting: on what tasks run.
        seconds: from now on.
        kept: called with each new result once it is on disk.
        clock: in seconds.
    """

    def __init__(
        self,
        folder: Path,
        setting: Setting,
        seconds: float,
        kept: Callable[[Result], None] = lambda result: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.setting, self.kept, self.clock = folder, setting, kept, clock
        self.end = clock() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.end - self.clock()

    def result(self, task: Task) -> Result | None:
        """What is there of a task.

        Raises:
            ValueError: its file is damaged.
        """
        path = self.folder / f"{task.name}.json"
        if not path.exists():
            return None
        try:
            return Result(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a result ({error}): remove it, and it is measured again") from None

    def keep(self, result: Result) -> None:
        """Writes a result, whole or not at all."""
        with replace_file(self.folder / f"{result.task}.json") as file:
            file.write(json.dumps(asdict(result), indent=1) + "\n")

    def run(self, tasks: Iterable[Task], *, retry: bool = False) -> list[str]:
        """Runs what has no result yet (with `retry`, no good one); returns the names that the time did not suffice for.

        Tasks come in order of value. One that needs more time than is left makes room for smaller ones after it.
        """
        waiting = []
        with Worker(self.setting) as worker:
            for task in tasks:
                known = self.result(task)
                if known is not None and (known.status == "ok" or not retry):
                    continue
                if self.left < task.least:
                    waiting.append(task.name)
                    continue
                limit = min(task.seconds, self.left)
                begin = self.clock()
                result = worker.run(task, limit)
                result.seconds = round(self.clock() - begin, 1)
                self.keep(result)
                self.kept(result)
        return waiting


class Worker:
    """A process that runs tasks, started when there is one and again when it is gone."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.process: BaseProcess | None = None
        self.pipe: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop(patience=10.0)

    def run(self, task: Task, limit: float) -> Result:
        """The result of a task, whatever happens to the process."""
        failed = Result(task.name, "failed", 0.0, "")
        if self.process is None or not self.process.is_alive():
            self._stop()
            self._start()
        assert self.pipe is not None
        try:
            if not self.pipe.poll(STARTING):
                raise TimeoutError(f"the worker did not start within {STARTING:.0f} s")
            failed.machine = self.pipe.recv()
            self.pipe.send((task, limit))
            if not self.pipe.poll(limit):
                raise TimeoutError(f"stopped after {limit:.0f} s")
            result, usable = self.pipe.recv()
        except TimeoutError as error:
            self._stop()
            failed.reason = str(error)
            return failed
        except (EOFError, OSError):
            assert self.process is not None
            self.process.join(5)
            failed.reason = f"the worker died with exit status {self.process.exitcode}"
            self._stop()
            return failed
        if not usable:
            self._stop()
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.setting))
        self.process.start()
        theirs.close()

    def _stop(self, patience: float = 0.0) -> None:
        """Ends the process: when it next asks for a task, or after so many seconds at once."""
        if self.pipe is not None:
            self.pipe.close()
        if self.process is not None:
            self.process.join(patience)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
        self.process = self.pipe = None


def _work(pipe: Connection, setting: Setting) -> None:
    """Runs one task after the other; each is announced by the line of the machine."""
    if setting.rehearse:
        torch.set_num_threads(1)
    usable = True
    with suppress(EOFError, BrokenPipeError):  # nobody asks any longer
        while usable:
            pipe.send(machine.line(setting.device))
            task, seconds = pipe.recv()
            result, usable = perform(task, setting, seconds)
            pipe.send((result, usable))


def perform(task: Task, setting: Setting, seconds: float) -> tuple[Result, bool]:
    """A task in this process: its result, and whether the process can run another one."""
    result, usable = Result(task.name, "ok", 0.0, machine.line(setting.device)), True
    try:
        result.found = task.run(setting, seconds)
    except AbsentError as error:
        result.status, result.reason = "absent", str(error)
    except Exception as error:  # anything may happen on a machine that nothing was ever run on
        result.status, result.reason = "failed", first_line(error)
        result.trace = "".join(traceback.format_exception(error))[-4000:]
        del error
        usable = _context_is_sound(setting)
    gc.collect()
    if setting.device == "cuda" and usable:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return result, usable


def _context_is_sound(setting: Setting) -> bool:
    """Whether the GPU still computes for this process; after an illegal access it never does again."""
    if setting.device != "cuda":
        return True
    try:
        torch.ones(1, device="cuda").item()
    except Exception:
        return False
    return True
