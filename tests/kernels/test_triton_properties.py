"""Properties of the Triton kernels, for any shape and any mixture of options: sanitized, and against fp64.

Chunks are what is tested: kernels launched as the losses launch them, without the engine's checks and merging.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from unittest import mock

import pytest
import torch
import triton.compiler.code_generator  # noqa: F401  (first imported while interpreting, it breaks later compilations)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosup_fast import reference
from cosup_fast.kernels.last_hidden import kernels as last_hidden_triton
from cosup_fast.kernels.softmax_xent import chunk_product
from cosup_fast.kernels.softmax_xent import configurations as shipped
from cosup_fast.kernels.softmax_xent.chunk_product import FusedChunk, RecomputedChunk
from cosup_fast.kernels.softmax_xent.chunk_rows import RowChunk
from cosup_fast.kernels.softmax_xent.chunk_torch import TorchChunk
from cosup_fast.kernels.softmax_xent.scores import Chunk, Scores, Softmax
from cosup_fast.kernels.tuning import Configuration
from cosup_fast.testing import LOGITS, operands, sanitize, with_gaps


class LevelledChunk(FusedChunk):
    """Fused, its exponentials above positives also where that does not pay."""

    @classmethod
    def _row_traffic(cls, scores: Scores) -> float:
        return 0.0


CHUNKS = [FusedChunk, LevelledChunk, RecomputedChunk, RowChunk]
FEW = settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
MANY = settings(max_examples=300, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def problems(draw) -> tuple[Scores, Tensor, Tensor | None]:
    """Scores of any kind, and what rows and columns weigh."""
    n, m, d = draw(st.integers(1, 70)), draw(st.integers(1, 100)), draw(st.integers(1, 50))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from([name for name in LOGITS if name != "near-uniform"]))
    seed = draw(st.integers(0, 99))
    x, w = operands(n, m, d, kind, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    several, symmetric = draw(st.booleans()), draw(st.booleans())
    with_target = symmetric or not several or draw(st.booleans())
    target = torch.randint(m, (n,), generator=g) if with_target else None
    key_ids = query_ids = positive_ids = None
    duplicates = False
    if several or draw(st.booleans()):
        known = draw(st.integers(1, 40))
        key_ids = torch.randint(-1, known, (m,), generator=g) * 2**40
        key_ids[0] = key_ids[0].abs()  # a row without a candidate has no loss
        if target is not None:
            key_ids[target] = key_ids[target].abs()
            query_ids = key_ids[target] if draw(st.booleans()) else None
        if several:
            duplicates = query_ids is not None and draw(st.booleans())
            if not duplicates or draw(st.booleans()):
                positive_ids = torch.randint(-1, known + 3, (n, draw(st.integers(0, 3))), generator=g) * 2**40
    scores = Scores(
        with_gaps(x) if draw(st.booleans()) else x,
        with_gaps(w, 16) if draw(st.booleans()) else w,
        scale=draw(st.sampled_from([1.0, 0.37, torch.tensor(2.5)])),
        bias=torch.randn(m, generator=g) if draw(st.booleans()) else None,
        target=target,
        query_ids=query_ids,
        key_ids=key_ids,
        positive_ids=positive_ids,
        duplicates_are_positive=duplicates,
        symmetric=symmetric,
        softcap=draw(st.sampled_from([None, 5.0])) if key_ids is None else None,
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        z_loss=draw(st.sampled_from([0.0, 1e-2])),
    )
    weights = torch.rand(n, generator=g) - 0.3
    return scores, weights, torch.rand(m, generator=g) - 0.3 if symmetric else None


def wide(s: Scores) -> Scores:
    values = {f.name: getattr(s, f.name) for f in fields(s)}
    return replace(s, **{k: v.double() for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()})


def near(ours: Softmax, exact: Softmax, atol: float) -> None:
    for name in ("lse", "positive_logit"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), rtol=2.0**-20, atol=atol)
    if exact.total is not None and exact.count is not None and ours.total is not None and ours.count is not None:
        assert torch.equal(ours.count.double(), exact.count.double())
        torch.testing.assert_close(
            ours.total.double(), exact.total, rtol=2.0**-20, atol=atol * exact.count.max().item()
        )


class Recorded:
    """Instead of sums: the gradient of the logits that they are given."""

    def add(self, d: Tensor, weights: Tensor | None = None) -> None:
        self.dtype = d.dtype
        self.gradient = d.double() if weights is None else d.double() * weights.double()[:, None]


def check(kind: type[Chunk], problem: tuple[Scores, Tensor, Tensor | None], tiles: Tiles, shuffles: int = 1) -> None:
    """Statistics are good to the rounding of scores; gradients to it, and to one of the operands' dtype or two."""
    s, g, h = problem
    if kind is LevelledChunk:
        target = torch.arange(len(s.x)) % len(s.w) if s.target is None else s.target
        if s.key_ids is not None:
            s.key_ids[target] = s.key_ids[target].abs()
        plain = {"positive_ids": None, "duplicates_are_positive": False, "label_smoothing": 0.0, "z_loss": 0.0}
        s, h = replace(s, target=target, symmetric=False, softcap=None, **plain), None
        assert LevelledChunk(s).levelled == (s.x.dtype != torch.float16)
    if kind is FusedChunk:
        s = replace(s, softcap=None)
        if FusedChunk.unsupported(s, False):
            s, h = replace(s, symmetric=False), None
    ranks = s.target is not None and (kind is RowChunk or not s.several_positives)
    exact_chunk = TorchChunk(wide(s))
    exact = exact_chunk.statistics(ranks=ranks)
    right = exact_chunk.logit_gradient(exact.rows, exact.columns, g.double(), None if h is None else h.double())
    with tiles.used(), sanitize(shuffles=shuffles):
        chunk, sums = kind(s), Recorded()
        ours = chunk.statistics(ranks=ranks)
        chunk.accumulate(ours, g, h, sums)  # pyright: ignore[reportArgumentType]
    gradient = sums.gradient
    scale = float(s.scale)
    size = 1 + scale * (s.x.double().norm(dim=1).max() * s.w.double().norm(dim=1).max()).item()
    near(ours.rows, exact.rows, 2.0**-20 * size)
    if exact.columns is not None:
        assert ours.columns is not None
        near(ours.columns, exact.columns, 2.0**-20 * size)
    # Scores of random operands are further apart than their rounding, unless a cap flattens them.
    if ranks and size < (100 if s.softcap is None else 2 * s.softcap):
        assert torch.equal(ours.rank, exact.rank)
        assert torch.equal(ours.top1, exact.top1)
    tiny = torch.finfo(sums.dtype).tiny * torch.finfo(sums.dtype).eps + 2.0**-22
    weight = (g.norm() + (0 if h is None else h.norm())).item() * scale * len(s.w) ** 0.5
    bound = (1.25 * torch.finfo(sums.dtype).eps + 2.0**-18 * size) * right.norm() + tiny * weight
    assert sums.dtype == s.x.dtype
    assert gradient.isfinite().all()
    assert (gradient.double() - right).norm() <= bound


@dataclass(frozen=True)
class Tiles:
    """How kernels are launched: loads by descriptors or pointers, columns in parts, merging in several steps."""

    descriptors: bool
    parts: int
    step: int

    @contextmanager
    def used(self):
        product = Configuration({"BM": 32, "BN": 32, "BK": 16, "PARTS": self.parts, "GROUP": 2})
        with ExitStack() as stack:
            for shapes in (
                shipped.PLAIN,
                shipped.HEAVY,
                shipped.SEVERAL_STORED,
                shipped.SEVERAL_SYMMETRIC,
                shipped.SINGLE,
                shipped.SINGLE_SEVERAL,
            ):
                stack.enter_context(mock.patch.dict(shapes, interpreter=product))
            stack.enter_context(mock.patch.object(shipped, "MERGE", Configuration({"BT": self.step, "BR": 32})))
            if not self.descriptors:
                stack.enter_context(mock.patch.object(chunk_product, "DESCRIPTORS", ()))
            yield


TILES = st.builds(Tiles, st.booleans(), st.sampled_from([1, 2, 4]), st.sampled_from([2, 32]))


@pytest.mark.parametrize("kind", CHUNKS, ids=lambda kind: kind.__name__)
@FEW
@given(problem=problems(), tiles=TILES)
def test_chunks(kind, problem, tiles):
    check(kind, problem, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHUNKS, ids=lambda kind: kind.__name__)
@MANY
@given(problem=problems(), tiles=TILES)
def test_many_chunks(kind, problem, tiles):
    check(kind, problem, tiles, shuffles=3)


@st.composite
def gathers(draw):
    t, d, r = draw(st.integers(1, 40)), draw(st.integers(2, 70)), draw(st.integers(0, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    hidden, upstream = (torch.randn(n, d, generator=g).to(dtype) for n in (t, r))
    if draw(st.booleans()):
        hidden = with_gaps(hidden, draw(st.sampled_from([3, 16])))
    weight = torch.randn(d, generator=g).to(dtype) if draw(st.booleans()) else None
    return hidden, torch.randint(t, (r,), generator=g), weight, upstream, draw(st.booleans())


def check_gather(problem, shuffles: int = 1) -> None:
    hidden, rows, weight, upstream, unit = problem
    with (
        mock.patch.object(last_hidden_triton, "MAX_BLOCK", 16),
        mock.patch.object(last_hidden_triton, "GROUP", 16),
        sanitize(shuffles=shuffles),
    ):
        y, *saved = last_hidden_triton.forward(hidden, rows, weight, 1e-6, unit, True)
        grads = last_hidden_triton.backward(upstream, rows, weight, *saved, len(hidden), unit, True, weight is not None)
    leaves = [t.double().requires_grad_() for t in (hidden, weight) if t is not None]
    exact = reference.gather_last_hidden(
        leaves[0], rows, norm_weight=leaves[1] if len(leaves) > 1 else None, eps=1e-6, normalize=unit
    )
    rights = exact.detach(), *torch.autograd.grad(exact, leaves, upstream.double())
    step = torch.finfo(hidden.dtype).eps
    for ours, right in zip((y, *grads), rights):
        assert ours.dtype == hidden.dtype
        # A row may be short and stand far above others in its gradient: its own size bounds its error.
        error, size = ((t.norm(dim=-1) if t.ndim > 1 else t.norm()) for t in (ours.double() - right, right))
        largest = upstream.double().norm() / hidden.double().norm(dim=1).min().clamp(max=1.0)
        assert (error <= step * size + (step / 64 + 2.0**-21) * (1 + largest)).all()


@FEW
@given(problem=gathers())
def test_gathers(problem):
    check_gather(problem)


@pytest.mark.slow
@MANY
@given(problem=gathers())
def test_many_gathers(problem):
    check_gather(problem, shuffles=3)
