"""What the GPU can do: the rates that everything else is compared with."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.session import Setting
from benchmarks.machine import version
from benchmarks.timing import seconds_of
from cosup_fast.training.utilization import known_peak

PACKAGES = ("torch", "triton", "transformers", "pydantic", "numpy", "flash-attn", "torchao", "bitsandbytes",
            "liger-kernel", "cut-cross-entropy", "quack-kernels", "inf-cl", "sentence-transformers")  # fmt: skip


def measure(setting: Setting, seconds: float) -> dict[str, Any]:
    """Versions, a copy's bytes/s, a product's FLOP/s by dtype, and what a launch costs the host."""
    return {"versions": versions(setting), **rates(setting)}


def versions(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {name: version(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    found["varlen attention of torch"] = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": getattr(properties, "L2_cache_size", None),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def rates(setting: Setting) -> dict[str, Any]:
    device, n = setting.device, setting.size(8192, 64)
    source = torch.ones(setting.size(2**30, 2**16), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {"copy bytes/s": 2 * source.numel() / best(lambda: target.copy_(source), setting)}
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for name, dtype in kinds.items():
            torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            found[f"{name} FLOP/s"] = 2 * n**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), setting)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    small = torch.zeros(16, device=device)
    synchronize(setting)
    begin = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    found["host seconds a launch"] = (time.perf_counter() - begin) / 1000
    synchronize(setting)
    found["peak bf16 FLOP/s by data sheet"] = peak(setting)
    return found


def best(run: Callable[[], Any], setting: Setting, rounds: int = 15) -> float:
    """The median seconds of a call after a warm-up."""
    times = [seconds_of(run, 1, setting.device) for _ in range(rounds + 3)]
    return median(times[3:])


def synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def peak(setting: Setting) -> float | None:
    """FLOP/s of dense bf16 products by the data sheet, where this GPU's is known."""
    known = known_peak(torch.cuda.get_device_name()) if setting.device == "cuda" else None
    return None if known is None else known * 1e12
