"""The machine: devices by name, what is refused, and memory that is kept and given back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cosup_fast.environment import choose_device

FAULTS = """
import resource, sys
import torch
from cosup_fast.environment import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [torch.ones(2, 1 << 20) for _ in range(32)]
    del gradients
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
first = [faults() for _ in range(3)][-1]
keep_freed_memory()
print(first, [faults() for _ in range(3)][-1])

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

kept = resident()
return_freed_memory()
print(kept - resident())
"""


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_devices_that_cannot_run_models_are_refused(name):
    with pytest.raises(ValueError, match=rf"--device='{name}': models run on cpu and cuda devices"):
        choose_device(name, "--device")


def test_the_device_of_a_cpu():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"training\.device='gpu'"):
        choose_device("gpu")


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    """256 MiB are new pages each time unless what was freed is kept; and it can be given back.

    They are 65,536 faults, or 2,048 where the kernel brings 32 pages at once.
    """
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after, returned = map(int, done.stdout.split())
    assert before > 1_000
    assert after < before / 4
    assert returned > 200 << 20
