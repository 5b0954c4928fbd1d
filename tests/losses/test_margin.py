"""The margin mask of false negatives: keys that score above the positive less a margin are no candidates."""

from __future__ import annotations

import math

import pytest
import torch

from cosup_fast import reference
from cosup_fast.functional import info_nce
from cosup_fast.losses import InfoNCELoss
from cosup_fast.testing import operands, sanitize
from tests.comparing import run, run_exactly

OPTIONS = [
    {},
    {"symmetric": True},
    {"key_ids": torch.arange(75) % 40},
    {"key_ids": torch.arange(75) % 40, "duplicates": "positive"},
    {"private_negatives": torch.randn(37, 3, 40, generator=torch.Generator().manual_seed(5))},
    {"reduction": "none", "scale": 3.0},
    {"label_smoothing": 0.1},
    {
        "private_negatives": torch.randn(37, 3, 40, generator=torch.Generator().manual_seed(5)),
        "label_smoothing": 0.1,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "plain")
@pytest.mark.parametrize("impl", ["stored", "fused", "rows", "recomputed"])
def test_equal_to_the_reference(impl, options):
    if impl != "stored":
        pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    x, w = operands(37, 75, 40)
    x = x + 0.02 * w[:37]
    options = {"margin": -0.5, **options}
    exact = run_exactly(reference.info_nce, x, w, **options)
    assert (reference.info_nce(x, w) - reference.info_nce(x, w, margin=-0.5)).abs() > 0.1
    if impl == "fused" and "label_smoothing" in options:
        with sanitize(), pytest.raises(ValueError, match="what a margin left out"):
            info_nce(x, w, impl=impl, **options)
        return
    with sanitize():
        ours = run(info_nce, x, w, impl=impl, **options)
    for name, b in exact.items():
        assert (ours[name].double() - b).norm() < 2.0**-20 * b.norm(), name


def test_ranks_count_candidates_alone():
    x, w = operands(37, 75, 40)
    x = x + 0.02 * w[:37]
    _, ours = info_nce(x, w, margin=-0.5, return_stats=True)
    _, right = reference.info_nce(x, w, margin=-0.5, return_stats=True)
    assert torch.equal(ours.rank, right.rank)
    assert ours.rank.sum() < info_nce(x, w, return_stats=True)[1].rank.sum()


def test_a_margin_that_leaves_nothing_is_refused():
    x, w = operands(6, 9, 8)
    with pytest.raises(ValueError, match="margin leaves a query no candidate but its positive"):
        info_nce(x, w, margin=1e3)
    InfoNCELoss(margin=0.0)(torch.eye(4), torch.eye(4))


def test_private_negatives_may_be_all_that_a_margin_leaves():
    x, w = operands(6, 9, 8)
    private = torch.zeros(6, 2, 8)
    with pytest.raises(ValueError, match="margin leaves a query no candidate but its positive"):
        info_nce(x, w, margin=1e3, private_negatives=private)
    far = -1e6 * x[:, None].sign()
    assert info_nce(x, w, margin=1e3, private_negatives=far) == 0  # each is there, and far below the positive


def test_a_query_with_one_key_loses_nothing_to_a_margin():
    x, w = operands(1, 1, 8)
    assert info_nce(x, w, margin=1e3) == 0
    x, w = operands(2, 2, 8)
    assert info_nce(x, w, margin=1e3, key_ids=torch.zeros(2, dtype=torch.int64)) == 0  # both keys are one passage


@pytest.mark.parametrize("impl", ["reference", "stored", "rows", "recomputed", "fused"])
def test_a_key_at_the_limit_is_not_above_it(impl):
    """Whole numbers, whose products every implementation has exactly: each key is there twice, each private one too."""
    if impl not in ("reference", "stored"):
        pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    x, w = torch.eye(3, 16), torch.eye(3, 16).repeat(2, 1)
    with sanitize():
        loss = info_nce(x, w, private_negatives=w[:3, None], margin=0.0, reduction="none", impl=impl)
        none = info_nce(x, w, private_negatives=w[:3, None], margin=0.5, reduction="none", impl=impl)
    torch.testing.assert_close(loss, torch.full((3,), math.log(3 * math.e + 4) - 1))
    torch.testing.assert_close(none, torch.full((3,), math.log(math.e + 4) - 1))


@pytest.mark.parametrize("impl", ["rows", "recomputed", "fused"])
def test_the_limit_of_bf16_scores_is_as_exact_as_they_are(impl):
    """Keys a little above and a little below the positive's score of about 32, where bf16 has a step of 0.25."""
    pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    x = (4 * operands(16, 16, 64)[0]).bfloat16()
    largest = torch.nn.functional.one_hot(x.abs().argmax(1), 64).bfloat16()
    w = 2 * x
    w = torch.cat([w, w * (1 + largest / 128), w * (1 - largest / 128)])
    exact = reference.info_nce(x.double(), w.double(), margin=0.0, reduction="none")
    with sanitize():
        ours = info_nce(x, w, margin=0.0, reduction="none", impl=impl)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-3)


def test_bad_margins():
    x, w = operands(6, 9, 8)
    ids = {"key_ids": torch.arange(9), "positive_ids": torch.arange(6)[:, None]}
    with pytest.raises(ValueError, match="margin is nan; pass a finite number"):
        InfoNCELoss(margin=float("nan"))
    with pytest.raises(ValueError, match="margin is given and positive is None"):
        info_nce(x, w, margin=0.1, **ids)
