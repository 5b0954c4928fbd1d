"""Launch configurations: the ones shipped for each GPU, and an opt-in search whose winners are kept on disk.

COSUP_AUTOTUNE=1 times the candidates of a kernel once for each device, dtype and bucket of sizes, and keeps the winner
as JSON under $COSUP_CACHE/autotune (by default ~/.cache/cosup-fast/autotune). Otherwise a kernel runs as shipped.
A configuration can change the last bits of a result: for the same bits everywhere, leave the search off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import statistics
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROUNDS = 9
"""Timed launches of a candidate; their median counts."""


@dataclass(frozen=True)
class Configuration:
    """How a kernel is launched."""

    constexprs: Mapping[str, int]  # tile sizes
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # registers of a thread; None leaves them to ptxas
    programs: int = 1  # on a multiprocessor at once, where the grid is that of a persistent kernel

    def __post_init__(self) -> None:
        object.__setattr__(self, "constexprs", dict(self.constexprs))

    def __hash__(self) -> int:
        return hash((frozenset(self.constexprs.items()), self.num_warps, self.num_stages, self.maxnreg, self.programs))

    @property
    def options(self) -> dict[str, int]:
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    @property
    def kwargs(self) -> dict[str, int]:
        """All of it, as keywords of a launch."""
        return {**self.constexprs, **self.options}


def nearest(capability: tuple[int, int]) -> str:
    """The target whose configurations a CUDA device of this compute capability runs.

    sm_86 stands for those from 8.6 to 8.9, too: sm_80's instructions in 99 KiB of shared memory.
    """
    return next((f"sm_{sm}" for sm in (120, 100, 90, 86) if capability >= divmod(sm, 10)), "sm_80")


def runs_as(target: str) -> str:
    """The target whose configurations another one of the compile matrix runs."""
    return nearest(divmod(int(target[3:]), 10)) if target.startswith("sm_") else target


def target_of(device: torch.device) -> str:
    """ "sm_80", "sm_86", "sm_90", "sm_100", "sm_120" or "gfx942" for a GPU, "interpreter" for anything else.

    A GPU that is not there, but planned for, is an sm_90.
    """
    if device.type != "cuda":
        return "interpreter"
    if not torch.cuda.is_available():
        return "sm_90"
    return "gfx942" if torch.version.hip else nearest(torch.cuda.get_device_capability(device))


def choose(
    kernel: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    shipped: Mapping[str, Configuration],  # by target
    candidates: Sequence[Configuration],
    launch: Callable[[Configuration], None],
    device: torch.device,
) -> Configuration:
    """The configuration to launch with: the shipped one, or with COSUP_AUTOTUNE=1 the fastest known.

    `launch` runs the kernel and may be called many times: outputs must not depend on what they held before. A candidate
    that raises is skipped. While a CUDA graph is captured nothing is timed.

    Raises:
        ValueError: COSUP_AUTOTUNE is neither 0 nor 1.
    """
    default = shipped[target_of(device)]
    if not _enabled():
        return default
    tried = list(dict.fromkeys((default, *candidates)))
    key = _key(kernel, dtype, sizes, tried, device)
    path = _path(kernel, dtype, key)
    with _lock:
        winner = known_winners.get(path)
        if winner is None and (winner := _read(path, key, tried)) is not None:
            known_winners[path] = winner
        if winner is not None or capturing(device):
            return winner or default
        seconds = _time(tried, launch, device)
        if not seconds:  # nothing runs, so the launch to come says why
            return default
        winner = known_winners[path] = min(seconds, key=seconds.__getitem__)
        _write(path, key, winner, seconds)
        return winner


known_winners: dict[Path, Configuration] = {}
_lock = threading.RLock()  # backward passes run in threads of their own, and must not be timed against each other


def _enabled() -> bool:
    value = os.environ.get("COSUP_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"COSUP_AUTOTUNE is {value!r}; set 1 to time configurations, 0 to run those shipped")
    return value == "1"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _key(
    kernel: str, dtype: torch.dtype, sizes: tuple[int, ...], tried: list[Configuration], device: torch.device
) -> dict[str, Any]:
    try:
        from triton import __version__ as version
    except ImportError:
        version = "none"
    listed = json.dumps([asdict(c) for c in tried], sort_keys=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "triton": version,
        "kernel": kernel,
        "dtype": str(dtype),
        "sizes": [1 << (size - 1).bit_length() if size > 0 else 0 for size in sizes],
        "candidates": hashlib.sha256(listed.encode()).hexdigest(),
    }


def _path(kernel: str, dtype: torch.dtype, key: dict[str, Any]) -> Path:
    cache = os.environ.get("COSUP_CACHE")
    folder = (Path(cache) if cache else Path.home() / ".cache" / "cosup-fast") / "autotune"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.-]", "_", f"{kernel}-{str(dtype).removeprefix('torch.')}")
    return folder / f"{name}-{digest[:16]}.json"


def _time(
    tried: list[Configuration], launch: Callable[[Configuration], None], device: torch.device
) -> dict[Configuration, float]:
    """Median seconds of each configuration that runs, taken in turns so that a drifting clock hits all alike."""
    running = []
    for configuration in tried:
        with contextlib.suppress(Exception):
            for _ in range(2):
                launch(configuration)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            running.append(configuration)
    once = _cuda_seconds if device.type == "cuda" else _seconds
    times: dict[Configuration, list[float]] = {configuration: [] for configuration in running}
    for _ in range(ROUNDS if len(running) > 1 else 1):
        for configuration in running:
            times[configuration].append(once(lambda c=configuration: launch(c), device))
    return {configuration: statistics.median(seconds) for configuration, seconds in times.items()}


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], None], device: torch.device) -> float:
    # Writing a buffer first empties the L2 cache, and keeps the GPU busy until the launch has reached it.
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.zeros(2 * cache, dtype=torch.uint8, device=device)
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def _read(path: Path, key: dict[str, Any], tried: list[Configuration]) -> Configuration | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        winner = Configuration(**stored["winner"])
        if stored["key"] != key or winner not in tried:
            raise ValueError("it was written for another search")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        warnings.warn(f"{path} is ignored and searched for again: {type(error).__name__}: {error}", stacklevel=3)
        return None
    return winner


def _write(path: Path, key: dict[str, Any], winner: Configuration, seconds: dict[Configuration, float]) -> None:
    """The file appears whole or not at all; of two processes that write it, the later one stays."""
    timings = [{**asdict(c), "seconds": s} for c, s in sorted(seconds.items(), key=lambda item: item[1])]
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                json.dump({"key": key, "winner": asdict(winner), "timings": timings}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} could not be written, so the next process searches again: {error}", stacklevel=3)
