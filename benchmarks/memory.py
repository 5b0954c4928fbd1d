"""Memory of a process, as the kernel counts it (Linux), and processes of their own to measure it in."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, VmHWM (the most so far), RssAnon (its own), RssFile (mapped)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def added(run: Callable[[], object]) -> int:
    """Bytes that a call adds to this process's resident set at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    run()
    return max(status("VmHWM") - before, 0)


def alone(module: str, *arguments: str, timeout: float = 3600) -> str:
    """The last line that a module prints, run in a process of its own.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {timeout:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return done.stdout.splitlines()[-1]
