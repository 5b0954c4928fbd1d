"""How much memory? The most a forward and backward holds beside its inputs and gradients.

On a CPU: resident set of a process of its own, its high-water mark reset after a first call and a return of freed
memory to the system. That includes what libraries allocate inside an operation. On a GPU: torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.check import free, step
from benchmarks.providers import every
from cosup_fast.functional import release_workspace

ROOT = Path(__file__).resolve().parents[1]


def measure(case: Case, provider: str, timeout: float = 3600) -> int:
    """Bytes, from a process of its own.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    arguments = json.dumps([case.loss, case.n, case.m, case.d, case.dtype, case.device, provider])
    # OMP_WAIT_POLICY and the like come from the caller, and so does the number of threads.
    return int(alone("benchmarks.peak", str(torch.get_num_threads()), arguments, timeout=timeout))


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


def here(case: Case, provider: str) -> int:
    """Bytes, in this process, which should do nothing else."""
    (chosen,) = (p for p in every() if p.name == provider)
    inputs, loss = case.inputs(), chosen.make(case)
    step(loss, inputs)
    free(inputs)
    release_workspace()
    gc.collect()
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, inputs)
        return max(torch.cuda.max_memory_allocated() - before - case.gradient_bytes, 0)
    return max(added(lambda: step(loss, inputs)) - case.gradient_bytes, 0)


def added(run: Callable[[], object]) -> int:
    """Bytes that a call adds to this process's resident set at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    run()
    return max(status("VmHWM") - before, 0)


def status(field: str) -> int:
    """A number of bytes in /proc/self/status: VmRSS, the resident set, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    *_case, _provider = json.loads(sys.argv[2])
    print(here(Case(*_case), _provider))
