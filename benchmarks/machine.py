"""What was measured on: one line, and a name for folders."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("kernels", "cosup_fast", "benchmarks/*.py")


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    name = re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", fields.get("model name", ""))).strip()
    kind = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{name or platform.machine()} ({', '.join([kind, *flags])})"


def commit() -> str:
    """The commit, marked where the files that are measured differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
        return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def today() -> str:
    return datetime.date.today().isoformat()


def line(device: str = "cpu") -> str:
    """CPU, cores, threads, memory, GPU, versions, commit, date."""
    cores = os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "numpy"))
    return (
        f"{processor()}, {cores} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB; {gpu}; "
        f"Python {platform.python_version()}, {versions}; {platform.system()}; commit {commit()}; {today()}"
    )


def load() -> str:
    """How busy the machine is with whatever else runs on it."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def folder(device: str = "cpu") -> str:
    """<hardware>-<date>."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor().split(' (')[0]} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + f"-{today()}"
