"""Have the exact figures changed? Products, FLOPs, bytes and workspace of ours against exact.json.

A change that is meant is written down by `python -m benchmarks gate --update` and committed with its cause.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import torch

from benchmarks.cases import LOSSES, Case
from benchmarks.counting import count
from benchmarks.providers import ours
from cosup_fast.kernels import softmax_xent_torch

PATH = Path(__file__).with_name("exact.json")
SMALL_WORKSPACE = 2**18
Figures = dict[str, dict[str, float | int | None]]


def measure() -> Figures:
    """Figures of every implementation of ours, by name: in one chunk of rows, and in several."""
    figures: Figures = {}
    for loss in LOSSES:
        shape = (320, 320, 96) if loss == "info-nce-symmetric" else (320, 448, 96)
        for dtype in ("fp32", "bf16"):
            case = Case(loss, *shape, dtype)
            inputs = case.inputs()
            for provider in ours.PROVIDERS:
                for workspace in (None, SMALL_WORKSPACE):
                    if workspace and provider.name == "ours reference":
                        continue
                    environment = {"COSUP_WORKSPACE_BYTES": str(workspace or 2**29)}
                    # As on a CPU without bf16 instructions, so that figures do not depend on the machine.
                    bf16 = mock.patch.object(softmax_xent_torch, "multiplies_bf16", return_value=False)
                    with mock.patch.dict(os.environ, environment), bf16:
                        counts, _ = count(case, provider.make(case), inputs)
                    name = f"{case}, {provider.name}" + (f", workspace {workspace}" if workspace else "")
                    figures[name] = {
                        **{f"{p} products": round(number, 9) for p, number in counts.products.items()},
                        "flops": counts.flops(case),
                        "traffic": counts.traffic,
                        "workspace": counts.workspace,
                    }
    return figures


def differences(found: Figures, wanted: Figures) -> list[str]:
    """What differs, a line each."""
    lines = [f"{name}: no longer measured" for name in wanted if name not in found]
    lines += [f"{name}: new" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        for figure in found[name].keys() | wanted[name].keys():
            now, then = found[name].get(figure), wanted[name].get(figure)
            if now != then:
                lines.append(f"{name}: {figure} is {now}, was {then}")
    return sorted(lines)


def release(version: str) -> str:
    """Major and minor: another release of torch may run other operations."""
    return ".".join(version.split(".")[:2])


def load() -> tuple[str, Figures]:
    """The torch they were measured with, and the figures."""
    content = json.loads(PATH.read_text())
    return content["torch"], content["figures"]


def update(figures: Figures) -> None:
    content = {"torch": release(torch.__version__), "figures": figures}
    new = PATH.with_name(PATH.name + ".writing")
    new.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(new, PATH)
