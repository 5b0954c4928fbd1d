"""What is measured, most valuable first."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, parse_shape
from benchmarks.gpu import generate, limits, losses, steps, tiles
from benchmarks.gpu.session import Setting, Task

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 4
"""Processes that share tests/gpu: most of its time goes into compiling kernels."""


def gpu_tests(setting: Setting, seconds: float) -> dict[str, Any]:
    """Runs tests/gpu, in a rehearsal with CPU tensors in the interpreter, and says what failed.

    Raises:
        RuntimeError: nothing was run.
    """
    shards = setting.size(max(1, min(SHARDS, (os.cpu_count() or 1) // 2)), 1)
    environment = os.environ | {"COSUP_REHEARSE_GPU": "1" if setting.rehearse else "0"}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--color=no"]
    end = time.monotonic() + 0.95 * seconds
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.log" for i in range(shards)]
        runs = []
        for i, log in enumerate(logs):
            with log.open("w") as file:
                shard = {"COSUP_TEST_SHARD": f"{i}/{shards}", "PYTHONUNBUFFERED": "1"}
                runs.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment | shard))
        finished = True
        for run in runs:
            try:
                run.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                finished = False
        text = "\n".join(log.read_text(errors="replace") for log in logs)
    return outcomes(text, finished)


def outcomes(text: str, finished: bool) -> dict[str, Any]:
    """What pytest -v says, also of a run that was stopped.

    Raises:
        RuntimeError: nothing was run.
    """
    found = re.findall(r"^(tests/gpu\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    if not found:
        raise RuntimeError(f"pytest ran nothing: {text.strip()[-1500:]}")
    failures = [name for name, outcome in found if outcome in ("FAILED", "ERROR")]
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (tests/gpu\S+?::.+?) - (.*)$", text, re.MULTILINE))
    return {
        "finished": finished,
        **collections.Counter(outcome.lower() for _, outcome in found),
        "failures": {name: reasons.get(name, "") for name in failures},
        "log": text[-20000:] if failures else "",
    }


def _loss(loss: str, shape: str, dtype: str, seconds: float, compiled: bool = False) -> Task:
    case = Case(loss, *parse_shape(shape), dtype)
    name = "-".join(["loss", loss, shape, dtype] + ["compiled"] * compiled)
    what = f"{case}{', providers that Inductor compiles' if compiled else ''}"
    return Task(name, what, partial(losses.measure, case, compiled), seconds, least=min(seconds, 25))


TASKS = [
    Task("limits", "versions, copies, products, launches", limits.measure, 60),
    Task("tests", "tests/gpu", gpu_tests, 240, least=60),
    _loss("info-nce", "8192x8192x1024", "bf16", 60),
    _loss("linear-cross-entropy", "4096x128256x4096", "bf16", 60),
    _loss("info-nce-symmetric", "8192x8192x1024", "bf16", 45),
    Task("step-llama2-7b", "two Llama2-7B as examples/llama2-7b-1x80g.yaml", steps.llama2_7b, 180, least=75),
    _loss("info-nce", "65536x65536x4096", "bf16", 75),
    Task("step-smollm2-135m", "SmolLM2-135M with itself", steps.smollm2_135m, 60),
    Task("generation-batch-1", "one request at a time", partial(generate.measure, 1), 45),
    Task("generation-batch-64", "64 requests at once", partial(generate.measure, 64), 45),
    _loss("info-nce", "8192x8192x1024", "fp32", 45),
    _loss("info-nce-symmetric", "8192x8192x1024", "fp32", 45),
    _loss("linear-cross-entropy", "2048x49152x576", "fp32", 45),
    _loss("linear-cross-entropy", "2048x49152x576", "bf16", 45),
    _loss("info-nce-symmetric", "32768x32768x1024", "bf16", 60),
    Task("tiles", "candidates of the score kernels' tiles, timed", tiles.measure, 120, least=45),
    _loss("info-nce", "8192x8192x1024", "bf16", 90, compiled=True),
    _loss("linear-cross-entropy", "4096x128256x4096", "bf16", 90, compiled=True),
    Task(
        "step-llama2-7b-gradients", "the same up to its gradients, all kept", steps.llama2_7b_gradients, 120, least=75
    ),
]
