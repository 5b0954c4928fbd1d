"""What made a result: the commit of the code, the versions of its packages, and the machine in a line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The commit of the code that runs, `with changes` where it was edited; the release's version outside a clone."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels")
        return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return versions()["cosup-fast"]


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    return {name: importlib.metadata.version(name) for name in ("cosup-fast", "torch", "transformers", "tokenizers")}


def machine(device: str) -> str:
    """The processor or the GPU, and how much of it."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{re.sub(r'[(](R|TM)[)]', '', name)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
