"""How much memory? The most a forward and backward holds beside its inputs and gradients.

On a CPU: resident set of a process of its own, its high-water mark reset after a first call and a return of freed
memory to the system. That includes what libraries allocate inside an operation. On a GPU: torch's allocator.
"""

from __future__ import annotations

import gc
import json
import sys

import torch

from benchmarks.cases import Case
from benchmarks.check import free, step
from benchmarks.memory import added, alone
from benchmarks.providers import every
from cosup_fast.functional import release_workspace


def measure(case: Case, provider: str, timeout: float = 3600) -> int:
    """Bytes, from a process of its own.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    arguments = json.dumps([case.loss, case.n, case.m, case.d, case.dtype, case.device, provider])
    # OMP_WAIT_POLICY and the like come from the caller, and so does the number of threads.
    return int(alone("benchmarks.peak", str(torch.get_num_threads()), arguments, timeout=timeout))


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


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    *_case, _provider = json.loads(sys.argv[2])
    print(here(Case(*_case), _provider))
