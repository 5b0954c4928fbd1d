"""A loss and its gradients beside those of plain PyTorch and of fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cosup_fast.testing import assert_close_to_fp64, value_and_gradients


def _floats(options: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()}


def run(loss: Callable[..., Tensor], x: Tensor, w: Tensor, upstream: float = 1.7, **options) -> dict[str, Tensor]:
    """The value, and the gradients of x, of w, and of every floating-point tensor among the options."""
    floats = _floats(options)

    def by_place(x: Tensor, w: Tensor, **more) -> Tensor:
        return loss(x, w, **more)

    rest = {name: value for name, value in options.items() if name not in floats}
    return value_and_gradients(by_place, {"x": x, "w": w, **floats}, upstream, **rest)


def run_exactly(loss: Callable[..., Tensor], x: Tensor, w: Tensor, **options) -> dict[str, Tensor]:
    """The same in fp64, of the same numbers."""
    wide = {name: value.double() for name, value in _floats(options).items()}
    return run(loss, x.double(), w.double(), **{**options, **wide})


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Asserts that tensors of the same names differ by at most so much of the largest entry."""
    assert ours.keys() == expected.keys()
    for name, b in expected.items():
        assert (ours[name] - b).abs().max() <= tolerance * b.abs().max() + 1e-12, name


def compare(
    ours: dict[str, Tensor], eager: Callable, x: Tensor, w: Tensor, *, atol: float, well: bool = True, **options
) -> None:
    """Asserts that the results of `run` are as close to the exact ones as those of plain PyTorch."""
    plain, exact = run(eager, x, w, **options), run_exactly(eager, x, w, **options)
    assert_close_to_fp64(ours, plain, exact, dtype=x.dtype, atol=atol, well_conditioned=well)
