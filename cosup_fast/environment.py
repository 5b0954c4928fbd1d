"""What this machine has: versions, devices, and which optional parts are usable and why not."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """One line of `cosup-fast env`."""

    name: str
    usable: bool
    note: str


# distribution, module, what it is for, the extra that brings it
_OPTIONAL = [
    ("triton", "triton", "fused kernels on a GPU", None),
    ("transformers", "transformers", "Gen and Embseq", "train"),
    ("safetensors", "safetensors", "checkpoints", "train"),
    ("gguf", "gguf", "preparing SmolLM2", "train"),
    ("datasets", "datasets", "hf:owner/name data sets", "train"),
    ("tensorboard", "tensorboard", "logs", "train"),
    ("wandb", "wandb", "logs", "wandb"),
    ("mlflow", "mlflow", "logs", "mlflow"),
    ("faiss-cpu", "faiss", "searching an index on the CPU, approximate kinds", "index"),
    ("scipy", "scipy", "confidence intervals", "eval"),
    ("ir-measures", "ir_measures", "metrics of ranked lists", "eval"),
    ("rouge-score", "rouge_score", "ROUGE-L", "eval"),
    ("sentence-transformers", "sentence_transformers", "the dense retrieval baseline", "eval"),
    ("fastapi", "fastapi", "serving", "serve"),
    ("uvicorn", "uvicorn", "serving", "serve"),
    ("flash-attn", "flash_attn", "FlashAttention on a GPU", "gpu"),
    ("peft", "peft", "LoRA adapters", "train"),
    ("bitsandbytes", "bitsandbytes", "8-bit optimizer states, 4-bit weights under adapters (QLoRA)", "gpu"),
    ("torchao", "torchao", "bf16 weights with stochastic rounding, 8-bit optimizer states", "gpu"),
]


def describe(*, imports: bool = False) -> list[Part]:
    """Every part with its version, or why it cannot be used.

    Args:
        imports: also import each optional package, which takes many seconds and finds broken binaries.
    """
    from cosup_fast import __version__

    parts = [
        Part("cosup-fast", True, __version__),
        Part("python", True, f"{platform.python_version()} on {platform.platform()}"),
        Part("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            note = (
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
            )
            parts.append(Part(f"cuda:{i}", True, note))
    else:
        built = "torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        parts.append(Part("cuda", False, f"{built}; everything runs on the CPU"))
    return parts + [_optional(*row, imports=imports) for row in _OPTIONAL]


def _optional(distribution: str, module: str, purpose: str, extra: str | None, *, imports: bool) -> Part:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        remedy = f"pip install 'cosup-fast[{extra}]'" if extra else "comes with torch on Linux"
        return Part(distribution, False, f"{purpose}: not installed ({remedy})")
    if module == "flash_attn" and not torch.cuda.is_available():
        return Part(distribution, False, f"{purpose}: {version} installed, but there is no CUDA device")
    try:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"no module named {module}")
        if imports:
            with no_downloaded_kernels():
                importlib.import_module(module)
    except Exception as error:  # a broken binary may raise anything
        return Part(distribution, False, f"{purpose}: {version} does not import ({type(error).__name__}: {error})")
    if module == "triton" and not torch.cuda.is_available():
        return Part(distribution, False, f"{purpose}: {version} installed, but there is no CUDA device")
    return Part(distribution, True, f"{purpose}: {version}")


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next large tensor; nothing where the C library is another one.

    By default it hands blocks of megabytes back to the kernel, and a training step on a CPU, which frees all gradients
    and asks for them again, touches as many new pages: some 150,000 page faults for 184 million weights. Tensors of
    other sizes leave holes, so the process grows with every step, until `return_freed_memory`.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Gives the kernel what `keep_freed_memory` kept: every page that nothing lies on."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def no_downloaded_kernels() -> Iterator[None]:
    """Around an import of bitsandbytes or peft: no binary is fetched and run.

    On CPUs with bf16 instructions bitsandbytes would get one through the package `kernels`, where that is installed.
    """
    absent = object()
    before: Any = sys.modules.get("kernels", absent)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it fails, which bitsandbytes allows for
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before


def choose_device(requested: str, name: str = "training.device") -> torch.device:
    """`auto` is CUDA when there is one, else the CPU; under torchrun `cuda` is the GPU of this rank.

    Args:
        requested: auto, or what torch calls a device.
        name: of the option, for the error.

    Raises:
        ValueError: there is no such device, or not one for each rank.
    """
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    if requested == "cuda" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        requested = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"{name}={requested!r}: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}={requested!r}: models run on cpu and cuda devices; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name}={requested!r}: this torch sees no CUDA device; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"there is no {device}, this machine has {torch.cuda.device_count()} GPUs: name another device, or "
            "start fewer ranks (torchrun --nproc-per-node)"
        )
    return device
