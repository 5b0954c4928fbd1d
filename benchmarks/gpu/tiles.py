"""Which tiles of the score kernels are fastest: the search of COSUP_AUTOTUNE=1, kept as a result."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.cases import Case
from benchmarks.check import free, step
from benchmarks.gpu.session import AbsentError, Setting
from benchmarks.providers import ours

CASES = [
    Case("info-nce", 8192, 8192, 1024, "bf16"),
    Case("linear-cross-entropy", 4096, 128256, 4096, "bf16"),
    Case("info-nce-symmetric", 8192, 8192, 1024, "bf16"),
    Case("info-nce", 65536, 65536, 4096, "bf16"),
]


def measure(setting: Setting, seconds: float) -> dict[str, Any]:
    """Seconds of every candidate by kernel, dtype and sizes; what the time did not suffice for is missing.

    Raises:
        AbsentError: there is no GPU to time on.
    """
    if setting.device != "cuda":
        raise AbsentError("times kernels on a GPU")
    end = time.monotonic() + 0.8 * seconds
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, COSUP_AUTOTUNE="1", COSUP_CACHE=folder):
            for case in CASES:
                for provider in ours.PROVIDERS:
                    if provider.triton and case.loss in provider.losses and time.monotonic() < end:
                        on_gpu = Case(case.loss, case.n, case.m, case.d, case.dtype, setting.device)
                        inputs = on_gpu.inputs()
                        step(provider.make(on_gpu), inputs)
                        free(inputs)
        for path in sorted((Path(folder) / "autotune").glob("*.json")):
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return found
