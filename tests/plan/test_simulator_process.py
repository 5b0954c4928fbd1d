"""The processes that simulate: none of them outlives whoever asked, and Ctrl-C ends the command without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")

# The second simulation is one of many seconds.
ASK = """
from cosup_fast.plan.configs import model_config
from cosup_fast.plan.planner import Simulator
from cosup_fast.plan.request import PlanRequest

with Simulator() as simulator:
    gen = model_config("smollm2-135m") | {"num_hidden_layers": 400}
    request = PlanRequest(gen=gen, gpus=1, sharding="none")
    print(simulator.process.pid, simulator.ask(request, layers=(1, 1))["trained"], flush=True)
    simulator.ask(request)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def test_a_killed_process_leaves_no_simulation_behind():
    parent = subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, trained = map(int, parent.stdout.readline().split())
    assert trained > 0
    time.sleep(1)
    assert alive(pid)
    parent.kill()
    parent.communicate()
    assert gone([pid], 5)


def test_ctrl_c_ends_a_plan_and_its_simulations():
    process = subprocess.Popen(
        [sys.executable, "-m", "cosup_fast", "plan", "model.gen=llama2-7b"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(simulations := children(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert err.strip() == "interrupted: no plan was made"
    assert gone(simulations, 5)
