"""The kit's own tests, and what the score kernels compile to, on every Triton that a supported torch pins.

Each version is installed alone into a folder that PYTHONPATH puts before the environment's own Triton. Set
COSUP_TRITONS to a folder to keep them for the next run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def tritons(tmp_path_factory) -> Path:
    kept = os.environ.get("COSUP_TRITONS")
    return Path(kept) if kept else tmp_path_factory.mktemp("tritons")


def environment(version: str, tritons: Path) -> dict[str, str]:
    """In which Python finds this Triton."""
    folder = tritons / version
    if not folder.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*install, f"triton=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"triton {version} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    env = os.environ | {"PYTHONPATH": str(folder)}
    found = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == version
    return env


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_kit_on_triton(version, tritons):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS), "-q", "-p", "no:cacheprovider"],
        env=environment(version, tritons), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kernel", "count"), [("stored", 81), ("levelled", 27), ("scores_bwd_logits", 39)])
@pytest.mark.parametrize("version", VERSIONS)
def test_shipped_binaries_on_triton(version, kernel, count, tritons):
    """Products that store their exponentials or their gradient, and what makes the former the latter."""
    targets = [argument for target in ("sm_80", "sm_90", "sm_100") for argument in ("--target", target)]
    command = [
        "cosup_fast.testing.compile",
        "cosup_fast.kernels.softmax_xent.configurations",
        "--kernel",
        kernel,
        *targets,
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--format", "markdown"],
        env=environment(version, tritons), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAIL" in line)
    assert done.stdout.count("| ok |") >= count


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_launches_on_the_oldest_triton(tritons):
    """Bound, specialised and compiled as launched, on what torch 2.11 pins."""
    launches = TESTS.parent / "kernels" / "test_launches.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(launches), "-q", "-m", "slow or not slow", "-p", "no:cacheprovider"],
        env=environment(VERSIONS[0], tritons), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10000:]
