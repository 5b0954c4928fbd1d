"""The rows of the last tokens of a pack's sequences, from their bounds."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from cosup_fast.kernels.last_hidden.op import (
    last_rows,
)

if importlib.util.find_spec("triton") is not None:
    import triton.compiler.code_generator  # noqa: F401  first imported by interpreted code, it stays interpreted


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_last_rows(dtype):
    rows = last_rows(torch.tensor([0, 3, 4, 9], dtype=dtype))
    assert rows.dtype == torch.int64
    assert rows.tolist() == [2, 3, 8]
    assert last_rows(torch.zeros(1, dtype=dtype)).tolist() == []
    assert last_rows(torch.empty(4, dtype=dtype, device="meta")).shape == (3,)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3, 3, 9], r"cu_seqlens\[1:3\] is \[3, 3\], a sequence of no rows"),
        ([0, 3, 2], r"cu_seqlens\[1:3\] is \[3, 2\]"),
        ([1, 3], "cu_seqlens starts with 1"),
        ([], r"cu_seqlens is torch.float32 of shape \(0,\)"),
        ([[0, 3]], r"cu_seqlens is torch.int64 of shape \(1, 2\)"),
        ([0.0, 3.0], "cu_seqlens is torch.float32"),
    ],
    ids=str,
)
def test_last_rows_errors(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        last_rows(torch.tensor(cu_seqlens))
