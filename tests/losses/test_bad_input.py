"""What the functions refuse: every error names the argument, its value and the remedy."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from cosup_fast.functional import gather_last_hidden, info_nce, linear_cross_entropy
from cosup_fast.testing import randn

rand = partial(randn, dtype=torch.float64)

IDS = torch.tensor([3, 1, 4, 1, 5, -1])
Q, K, H, W, T = (
    rand(4, 3),
    rand(6, 3),
    rand(4, 3),
    rand(6, 3),
    torch.tensor([0, 5, -100, 2]),
)
INDEX = torch.arange(4)
ERRORS = [
    (info_nce, {"query": [1.0]}, TypeError, "query is a list"),
    (info_nce, {"query": Q.long()}, TypeError, "query has dtype torch.int64"),
    (info_nce, {"query": Q[0]}, ValueError, r"query has shape \(3,\)"),
    (info_nce, {"keys": rand(6, 5)}, ValueError, "keys has width 5, query has 3"),
    (info_nce, {"keys": K.float()}, TypeError, "keys has dtype torch.float32, query has torch.float64"),
    (info_nce, {"keys": K.to("meta")}, ValueError, "keys is on meta"),
    (info_nce, {"keys": K[:3]}, ValueError, "keys has 3 rows for 4 queries; pass positive"),
    (info_nce, {"keys": K[:0]}, ValueError, "keys has 0 rows for 4 queries"),
    (info_nce, {"keys": K[:0], "positive": INDEX}, ValueError, "positive holds 0"),
    (info_nce, {"positive": INDEX[:3]}, ValueError, r"positive has shape \(3,\)"),
    (info_nce, {"positive": INDEX.int()}, TypeError, "positive has dtype torch.int32; convert it to torch.int64"),
    (info_nce, {"positive": INDEX + 3}, ValueError, r"positive holds 6; every entry must be in 0\.\.5"),
    (info_nce, {"positive": INDEX - 1}, ValueError, "positive holds -1"),
    (info_nce, {"query_ids": INDEX}, ValueError, "query_ids is given but key_ids is None"),
    (info_nce, {"positive_ids": INDEX[:, None]}, ValueError, "positive_ids is given but key_ids is None"),
    (info_nce, {"key_ids": INDEX}, ValueError, r"key_ids has shape \(4,\)"),
    (
        info_nce,
        {"key_ids": IDS, "positive": INDEX + 2},
        ValueError,
        r"positive\[3\] is 5, a key that key_ids marks",
    ),
    (info_nce, {"key_ids": IDS - 3, "positive": INDEX * 0 + 1}, ValueError, r"positive\[0\] is 1"),
    (
        info_nce,
        {"key_ids": IDS, "positive_ids": torch.tensor([[3], [4], [1], [-1]])},
        ValueError,
        r"positive_ids\[3\] is \[-1\], none of which is in key_ids",
    ),
    (
        info_nce,
        {"key_ids": IDS, "positive_ids": INDEX[:, None] * 0 + 1, "symmetric": True},
        ValueError,
        "symmetric=True with positive_ids",
    ),
    (info_nce, {"duplicates": "drop"}, ValueError, "duplicates is 'drop'; pass one of 'mask', 'positive', 'keep'"),
    (info_nce, {"private_negatives": rand(3, 2, 3)}, ValueError, r"private_negatives has shape \(3, 2, 3\)"),
    (
        info_nce,
        {"private_negatives": rand(4, 2, 3).float()},
        TypeError,
        "private_negatives has dtype torch.float32",
    ),
    (info_nce, {"scale": 0.0}, ValueError, "scale is 0.0; pass a positive"),
    (info_nce, {"scale": -1}, ValueError, "scale is -1"),
    (info_nce, {"scale": math.inf}, ValueError, "scale is inf"),
    (info_nce, {"scale": torch.tensor(math.nan)}, ValueError, "scale is nan"),
    (info_nce, {"scale": torch.ones(1)}, ValueError, r"scale has shape \(1,\)"),
    (info_nce, {"scale": "20"}, TypeError, "scale is a str"),
    (info_nce, {"scale": True}, TypeError, "scale is a bool; pass a number"),
    (info_nce, {"label_smoothing": "0.1"}, TypeError, "label_smoothing is a str; pass a number"),
    (info_nce, {"margin": torch.tensor(0.1)}, TypeError, "margin is a Tensor; pass a number or None"),
    (info_nce, {"normalize": "no"}, TypeError, "normalize is 'no'; pass True or False"),
    (linear_cross_entropy, {"z_loss": torch.tensor(0.1)}, TypeError, "z_loss is a Tensor; pass a number"),
    (linear_cross_entropy, {"softcap": torch.tensor(30.0)}, TypeError, "softcap is a Tensor; pass a number or None"),
    (info_nce, {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
    (info_nce, {"reduction": "avg"}, ValueError, "reduction is 'avg'"),
    (info_nce, {"impl": "triton"}, ValueError, "impl is 'triton'"),
    (linear_cross_entropy, {"weight": rand(6, 5)}, ValueError, "weight has width 5, hidden has 3"),
    (linear_cross_entropy, {"weight": W.float()}, TypeError, "weight has dtype torch.float32"),
    (linear_cross_entropy, {"weight": W[:0]}, ValueError, r"weight has shape \(0, 3\)"),
    (linear_cross_entropy, {"target": T[:3]}, ValueError, r"target has shape \(3,\)"),
    (linear_cross_entropy, {"target": T.float()}, TypeError, "target has dtype torch.float32"),
    (linear_cross_entropy, {"target": T + 1}, ValueError, r"target holds 6; every entry must be in 0\.\.5 or ignore"),
    (linear_cross_entropy, {"target": T, "ignore_index": -1}, ValueError, r"target holds -100.*\(-1\)"),
    (linear_cross_entropy, {"bias": rand(5)}, ValueError, r"bias has shape \(5,\)"),
    (linear_cross_entropy, {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    (linear_cross_entropy, {"z_loss": -0.1}, ValueError, "z_loss is -0.1"),
    (linear_cross_entropy, {"hidden": rand(2, 2, 3)}, ValueError, r"hidden has shape \(2, 2, 3\)"),
    (gather_last_hidden, {"hidden": rand(3)}, ValueError, r"hidden has shape \(3,\)"),
    (gather_last_hidden, {"rows": torch.tensor([12])}, ValueError, r"rows holds 12; every entry must be in 0\.\.3"),
    (gather_last_hidden, {"norm_weight": rand(4)}, ValueError, r"norm_weight has shape \(4,\)"),
    (gather_last_hidden, {"eps": -1.0}, ValueError, "eps is -1.0"),
]


@pytest.mark.parametrize(("f", "wrong", "kind", "message"), ERRORS, ids=[f"{e[0].__name__}: {e[3]}" for e in ERRORS])
def test_errors_name_the_argument_its_value_and_the_remedy(f, wrong, kind, message):
    right = {
        info_nce: {"query": Q, "keys": K},
        linear_cross_entropy: {"hidden": H, "weight": W, "target": T},
        gather_last_hidden: {"hidden": H, "rows": INDEX},
    }[f]
    f(**right)
    with pytest.raises(kind, match=message):
        f(**{**right, **wrong})
