"""What a loss of given shapes will run and what that costs, without running it."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cosup_fast.checks import Impl, Reduction, check_choice, check_softcap
from cosup_fast.kernels.softmax_xent import dispatch
from cosup_fast.kernels.softmax_xent.chunk_torch import operand_dtype
from cosup_fast.kernels.softmax_xent.dispatch import Plan
from cosup_fast.kernels.softmax_xent.scores import Scores


def explain(
    n: int,
    m: int,
    d: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    symmetric: bool = False,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    gradients: int = 2,
    impl: Impl = "auto",
) -> Plan:
    """What `info_nce` of N queries and M keys, or `linear_cross_entropy` of N supervised rows and M tokens, will run.

        G = 2 N M D FLOP

    Args:
        n, m, d: rows, candidates and width, >= 1. Nothing of these sizes is allocated.
        dtype: of the operands. A CPU without bf16 instructions multiplies them in fp32.
        device: where they are; it need not exist.
        symmetric: as of `info_nce`.
        softcap: as of `linear_cross_entropy`.
        reduction: "none" multiplies the scores again in backward.
        gradients: how many of the two operands need a gradient, 0 to 2.
        impl: "auto" or an implementation that forms chunks of scores; the reference has no plan.

    Returns:
        A `Plan`: impl and the reason for it, products (of G), flops, bytes moved, workspace (bytes beside operands and
        gradients), chunks, the rows of one, and the cost that "auto" compares. bf16 scores too large to be trusted take
        one more product on a CPU; that depends on values. Where "auto" is asked for rank and top-1 of rows with several
        positives, which fused and recomputed do not give, it runs another one.

    Raises:
        TypeError: a size is no int.
        ValueError: a size, `gradients` or option out of its range.
    """
    for name, size in (("n", n), ("m", m), ("d", d)):
        if not isinstance(size, int):
            raise TypeError(f"{name} is a {type(size).__name__}; pass an int")
        if size < 1:
            raise ValueError(f"{name} is {size}; pass a size of at least 1")
    if gradients not in (0, 1, 2):
        raise ValueError(f"gradients is {gradients}; pass how many of the two operands need one: 0, 1 or 2")
    check_softcap(softcap)
    check_choice("reduction", reduction, Reduction)
    check_choice("impl", impl, Impl)
    if impl == "reference":
        raise ValueError("impl is 'reference', which materialises every score; pass 'auto' or 'stored' for a plan")
    device = torch.device(device)
    wide = operand_dtype(dtype, device, n * m * d)
    with FakeTensorMode():
        x, w = (torch.empty(size, d, dtype=wide, device=device) for size in (n, m))
        target = torch.empty(n, dtype=torch.int64, device=device)
        scores = Scores(x, w, target=target, symmetric=symmetric, softcap=softcap)
        return dispatch.plan(impl, scores, at_once=reduction != "none", gradients=gradients)
