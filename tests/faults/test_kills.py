"""Every command, stopped at random by SIGTERM and SIGKILL, leaves what is whole and ends as if nobody had stopped it.

COSUP_KILLS=1000 COSUP_KILLS_SEED=7 pytest -m slow tests/faults/test_kills.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("COSUP_KILLS", "300"))
SEED = int(os.environ.get("COSUP_KILLS_SEED", "0"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")
def test_commands_stopped_at_random_lose_nothing(world, tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kills.py")), str(world), str(tmp_path), str(KILLS), str(SEED)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    stops = sum(int(count) for count in re.findall(r"stopped (\d+) times", done.stdout))
    assert stops >= 0.7 * KILLS, done.stdout
