"""The pytest plugin, in a project of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

PROJECT = """
import pytest, torch
from cosup_fast.testing import examples


def test_interpreted(interpreted):
    assert examples.logsumexp(torch.zeros(3, 4)).tolist() == pytest.approx([1.3862944] * 3)


def test_counted(counted):
    examples.matmul(torch.ones(32, 32), torch.ones(32, 32))
    assert counted.flops == 2 * 32**3


def test_sanitized(sanitized):
    examples.softmax(torch.zeros(3, 4)).sum()


def test_a_finding_fails(sanitized):
    sanitized.poison(x := torch.zeros(3, 4))
    examples.softmax(x)


@pytest.mark.compile_matrix("project_kernels", targets=["sm_80"])
def test_binaries(compiled):
    compiled.check()
""".replace("OUR, ", "")

KERNELS = """
from cosup_fast.testing import examples

COMPILE_CASES = [case for case in examples.COMPILE_CASES if case["kernel"] is examples.softmax_fwd_kernel]
"""


def test_the_plugin_in_a_project(tmp_path):
    (tmp_path / "project_kernels.py").write_text(KERNELS)
    (tmp_path / "test_project.py").write_text(PROJECT)
    command = [sys.executable, "-m", "pytest", "-p", "cosup_fast.testing.plugin", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--strict-markers", "--rootdir", str(tmp_path), "-rA", "test_project.py"],
        cwd=tmp_path, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "6 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "ERROR test_project.py::test_a_finding_fails" in done.stdout
    assert "test_binaries[softmax_fwd_kernel-bf16-sm_80]" in done.stdout
