"""What the process is told about its machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from cosup_fast.environment import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [torch.ones(2, 1 << 20) for _ in range(32)]
    del gradients
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
first = [faults() for _ in range(3)][-1]
keep_freed_memory()
print(first, [faults() for _ in range(3)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    """256 MiB are 65,536 pages, which are new each time unless what was freed is kept."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 50_000
    assert after < before / 4
