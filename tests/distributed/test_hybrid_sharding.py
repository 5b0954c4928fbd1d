"""Hybrid sharding: gradients are summed within the rows of a mesh and over them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its ranks are forks of a process that has imported torch")
def test_two_replicas_of_two_shards_have_the_gradients_of_one_process(tmp_path):
    script = Path(__file__).with_name("hybrid.py")
    store = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, str(script), str(store)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    differences = [float(Path(f"{store}.{number}").read_text()) for number in range(4)]
    assert max(differences) < 1e-14
