"""The losses on a GPU beside the three bare products: checked at a size where fp64 fits, then timed and weighed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import DTYPES, Case
from benchmarks.check import Loss, errors, first_line, free, refusal, step, truth
from benchmarks.gpu.session import AbsentError, Setting
from benchmarks.providers import Provider, every
from benchmarks.timing import PRODUCTS, Spread, Step, interleave, limits, ratios
from cosup_fast.functional import explain

CHECKED = 4096
"""Rows and, but for a vocabulary, candidates at most where results are compared with fp64."""


@dataclass
class Row:
    """What was found of one provider."""

    provider: str
    version: str = ""
    status: str = "ok"  # or skipped, refused, failed, limit
    reason: str = ""
    errors: dict[str, float] | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None  # workspace that `explain` foresees, and gradients in fp32
    seconds: list[float] | None = None
    ratio: float | None = None  # median over the rounds of the time over that of the fastest bare products
    products_flops: float | None = None  # 3 G / seconds


def measure(case: Case, compiled: bool, setting: Setting, seconds: float) -> dict[str, Any]:
    """Rows of the providers that have this loss, then of the limits.

    Args:
        case: the real one; a rehearsal shrinks it.
        compiled: providers that Inductor compiles, which takes long, or the others.
        setting: of the run.
        seconds: for the rounds.

    Raises:
        AbsentError: no provider can run.
    """
    case = _on(setting, case)
    rows: dict[str, Row] = {}
    with _kernels(setting):
        steps: dict[str, Step] = {}
        inputs, small = case.inputs(), _checked(case)
        fit = list(_fit(small, [p for p in every() if p.compiled == compiled], setting, rows))
        for provider in fit:
            row = rows[provider.name]
            try:
                loss = provider.make(case)
                row.peak_bytes = _peak(partial(step, loss, inputs), case)
                steps[provider.name] = partial(step, loss, inputs)
            except Exception as error:  # memory above all
                row.status, row.reason = "failed", first_line(error)
                del error
            free(inputs)
            gc.collect()
        if not steps:
            raise AbsentError("; ".join(f"{row.provider} {row.status}: {row.reason}" for row in rows.values()))
        steps |= limits(case, inputs)
        rounds = setting.size(15, 1)
        times = interleave(steps, rounds=rounds, seconds=0.6 * seconds, device=case.device)
    for name, values in times.items():
        row = rows.setdefault(name, Row(name, status="limit"))
        row.seconds, row.ratio = values, None
        if name.startswith(PRODUCTS) or row.status == "ok":
            row.ratio = Spread.of(ratios(times, name)).median
            row.products_flops = 3 * case.product / Spread.of(values).median
    for name, plan in plans(case).items():
        if name in rows:
            rows[name].planned_bytes = plan
    return {"case": asdict(case), "chosen by auto": _auto(case), "rows": [asdict(row) for row in rows.values()]}


def _on(setting: Setting, case: Case) -> Case:
    if not setting.rehearse:
        return replace(case, device=setting.device)
    return replace(case, n=32, m=32 if case.loss == "info-nce-symmetric" else 64, d=16, device=setting.device)


def _checked(case: Case) -> Case:
    """A case of this width and dtype whose scores fit in fp64."""
    vocabulary = case.loss == "linear-cross-entropy"
    n = min(case.n, CHECKED // 8 if vocabulary else CHECKED)
    return replace(case, n=n, m=case.m if vocabulary else min(case.m, CHECKED))


def _fit(case: Case, providers: list[Provider], setting: Setting, rows: dict[str, Row]) -> Iterator[Provider]:
    """Those whose loss and gradients are right; the others leave their reasons in `rows`."""
    inputs, right = case.inputs(), None
    for provider in providers:
        if case.loss not in provider.losses:
            continue
        row = rows[provider.name] = Row(provider.name, provider.version)
        interpreted = setting.rehearse and provider.name.startswith("ours")
        if reason := provider.reason(case, counting=interpreted):
            row.status, row.reason = "skipped", reason
            continue
        right = right or truth(case, inputs)
        try:
            loss: Loss = provider.make(case)
            found = errors(step(loss, inputs), right.exact)
            row.errors = found._asdict()
            if reason := refusal(case, found, right.eager):
                row.status, row.reason = "refused", reason
            else:
                yield provider
        except Exception as error:  # a peer may raise anything
            row.status, row.reason = "failed", first_line(error)
            del error
        free(inputs)


def _peak(run: Step, case: Case) -> int | None:
    """Bytes that a second step holds beside inputs and gradients."""
    run()
    if case.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def plans(case: Case) -> dict[str, int]:
    """Bytes that `explain` foresees by implementation."""
    found = {}
    for impl in ("stored", "fused", "rows", "recomputed"):
        try:
            found[f"ours {impl}"] = explain(**_asked(case), impl=impl).workspace
        except ValueError:
            continue
    return found


def _auto(case: Case) -> str:
    plan = explain(**_asked(case))
    return f"{plan.impl}: {plan.reason}"


def _asked(case: Case) -> dict[str, Any]:
    return {
        "n": case.n, "m": case.m, "d": case.d, "dtype": DTYPES[case.dtype], "device": case.device,
        "symmetric": case.loss == "info-nce-symmetric",
    }  # fmt: skip


@contextmanager
def _kernels(setting: Setting) -> Iterator[None]:
    """In a rehearsal our kernels run in the interpreter, and nothing is compiled."""
    with ExitStack() as stack:
        if setting.rehearse:
            from cosup_fast.testing import interpret

            stack.enter_context(interpret())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
