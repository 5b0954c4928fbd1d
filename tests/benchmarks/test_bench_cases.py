"""Cases and providers: what is measured, and who is left out for which reason."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.cases import LOSSES, Case, parse_shape
from benchmarks.check import errors, refusal, step, truth
from benchmarks.providers import Provider, chosen, every

SMALL = {loss: (48, 48, 32) if loss == "info-nce-symmetric" else (48, 96, 32) for loss in LOSSES}


def test_parse_shape():
    assert parse_shape("2048x49152x576") == (2048, 49152, 576)


@pytest.mark.parametrize("text", ["", "8x8", "8x8x8x8", "8X8X8", "axbxc", "8x-8x8", " 8x8x8"])
def test_shape_that_is_none(text):
    with pytest.raises(ValueError, match="NxMxD"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("infonce", 8, 8, 8), "choose from info-nce"),
        (("info-nce", 8, 8, 8, "int8"), "dtype is 'int8'"),
        (("info-nce", 8, 7, 8), "M >= N"),
        (("info-nce-symmetric", 8, 9, 8), "M = N"),
        (("linear-cross-entropy", 8, 0, 8), "at least 1"),
    ],
)
def test_case_that_is_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case(*arguments)


@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_are_the_same_on_every_call_and_neither_trivial_nor_hopeless(loss):
    case = Case(loss, *SMALL[loss])
    torch.manual_seed(1)
    first = case.inputs()
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, case.inputs()))
    value = case.eager(*first).item()
    assert 0.05 < value < torch.tensor(case.m).log().item()


EAGER = [(p, loss) for p in every() for loss in p.losses if not p.triton and not p.compiled]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("provider", "loss"), EAGER, ids=[f"{p.name}, {loss}" for p, loss in EAGER])
def test_providers_compute_the_loss(provider, loss, dtype):
    case = Case(loss, *SMALL[loss], dtype)
    if loss == "info-nce-cosine" and provider.name == "info-nce-pytorch":
        case = Case(loss, 48, 48, 32, dtype)
    if reason := provider.reason(case):
        pytest.skip(reason)
    inputs = case.inputs()
    right = truth(case, inputs)
    found = errors(step(provider.make(case), inputs), right.exact)
    assert refusal(case, found, right.eager) is None


@pytest.mark.slow
@pytest.mark.parametrize("provider", [p for p in every() if p.compiled], ids=lambda p: p.name)
def test_compiled_providers_compute_the_loss(provider):
    for loss in provider.losses:
        case = Case(loss, *SMALL[loss])
        if reason := provider.reason(case):
            pytest.skip(reason)
        inputs = case.inputs()
        right = truth(case, inputs)
        assert refusal(case, errors(step(provider.make(case), inputs), right.exact), right.eager) is None


def test_reasons():
    def make(case):
        raise AssertionError("made though it cannot run")

    case = Case("info-nce", 8, 12, 16)
    missing = Provider("a", "", ("info-nce",), make, package="no-such-distribution")
    assert missing.reason(case) == (
        "no-such-distribution is not installed: pip install --no-deps -r benchmarks/requirements-peers.txt"
    )
    assert missing.version == "no-such-distribution"
    assert missing.reason(Case("linear-cross-entropy", 8, 12, 16)) == "has no linear-cross-entropy"
    kernels = Provider("b", "", ("info-nce",), make, triton=True)
    assert kernels.reason(case) == "Triton kernels and no GPU: only counted"
    if importlib.util.find_spec("triton"):
        assert kernels.reason(case, counting=True) is None
    assert kernels.reason(Case("info-nce", 8, 12, 16, device="cuda")) is None
    picky = Provider("c", "", ("info-nce",), make, unfit=lambda case: f"D is {case.d}")
    assert picky.reason(case) == "D is 16"


def test_choosing():
    assert [p.name for p in chosen(None)] == [p.name for p in every()]
    assert [p.name for p in chosen(["dense"])] == ["dense"], "a whole name is that one"
    ours = [f"ours {name}" for name in ("stored", "reference", "fused", "rows", "recomputed")]
    assert [p.name for p in chosen(["ours", "inf_cl"])] == [*ours, "inf_cl"]
    with pytest.raises(ValueError, match="provider is 'theirs'; choose from 'ours stored'"):
        chosen(["theirs"])


def test_names_are_unique():
    names = [p.name for p in every()]
    assert len(set(names)) == len(names)
