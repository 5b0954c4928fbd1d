"""Have the exact figures changed? Products, FLOPs, bytes, workspace and binaries of ours against exact.json.

A change that is meant is written down by `python -m benchmarks gate --update` and committed with its cause.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

from benchmarks.cases import LOSSES, Case
from benchmarks.counting import Counts, count, count_kernels
from benchmarks.machine import version
from benchmarks.providers import ours
from cosup_fast.files import replace_file
from cosup_fast.kernels.softmax_xent import chunk_torch

PATH = Path(__file__).with_name("exact.json")
SMALL_WORKSPACE = 2**18
BINARY = "binary of "
Figures = dict[str, dict[str, float | int | str | None]]


def _case(loss: str, dtype: str) -> Case:
    return Case(loss, 320, 320 if loss == "info-nce-symmetric" else 448, 96, dtype)


def _figures(case: Case, counts: Counts) -> dict[str, float | int | str | None]:
    return {
        **{f"{p} products": round(number, 9) for p, number in counts.products.items()},
        "flops": counts.flops(case),
        "traffic": counts.traffic,
        "workspace": counts.workspace,
    }


def measure() -> Figures:
    """Figures of every implementation of ours, by name."""
    return measure_torch() | measure_kernels()


def measure_torch() -> Figures:
    """Of those that torch runs: in one chunk of rows, and in several."""
    figures: Figures = {}
    for loss in LOSSES:
        for dtype in ("fp32", "bf16"):
            case = _case(loss, dtype)
            inputs = case.inputs()
            for provider in ours.PROVIDERS:
                if provider.triton:
                    continue
                for workspace in (None, SMALL_WORKSPACE):
                    if workspace and provider.name == "ours reference":
                        continue
                    environment = {"COSUP_WORKSPACE_BYTES": str(workspace or 2**29)}
                    # As on a CPU without bf16 instructions, so that figures do not depend on the machine.
                    bf16 = mock.patch.object(chunk_torch, "multiplies_bf16", return_value=False)
                    with mock.patch.dict(os.environ, environment), bf16:
                        counts, _ = count(case, provider.make(case), inputs)
                    name = f"{case}, {provider.name}" + (f", workspace {workspace}" if workspace else "")
                    figures[name] = _figures(case, counts)
    return figures


def measure_kernels() -> Figures:
    """Of those with Triton kernels, with the tiles of a GPU, and what they compile to for it."""
    figures: Figures = {}
    for loss in ("info-nce", "info-nce-symmetric", "linear-cross-entropy"):
        case = _case(loss, "bf16")
        inputs = case.inputs()
        for provider in ours.PROVIDERS:
            if not provider.triton or provider.reason(case, counting=True):
                continue
            with mock.patch.dict(os.environ, COSUP_WORKSPACE_BYTES=str(2**29)):
                counts, _, binaries = count_kernels(case, provider, inputs)
            figures[f"{case}, {provider.name}"] = _figures(case, counts) | {
                "launches": counts.launches,
                "atomics": counts.atomics,
            }
            for binary in binaries:
                name = f"{BINARY}{binary.kernel} ({binary.configuration}) in {loss}, {provider.name}"
                figures[name] = binary._asdict()
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


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: release(version(name)) for name in ("torch", "triton")}


def load() -> tuple[dict[str, str], Figures]:
    """The versions they were measured with, and the figures."""
    content = json.loads(PATH.read_text())
    return content["versions"], content["figures"]


def update(figures: Figures) -> None:
    content = {"versions": versions(), "figures": figures}
    with replace_file(PATH) as file:
        file.write(json.dumps(content, indent=1) + "\n")
