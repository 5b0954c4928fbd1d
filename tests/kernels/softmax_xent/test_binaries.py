"""What the score kernels compile to: no spills, shared memory that exists, tensor cores in every product."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from cosup_fast.kernels.softmax_xent.configurations import FULL, LOSSES, TARGETS
from cosup_fast.testing import collect, compile_case
from cosup_fast.testing import compile as kit

MODULE = "cosup_fast.kernels.softmax_xent.configurations"
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [
        ("scores_fwd_kernel, in-batch negatives, stored", "bf16", "sm_90"),
        ("scores_fwd_kernel, vocabulary, stored", "fp16", "sm_100"),
        ("scores_bwd_logits_kernel, everything", "bf16", "sm_80"),
        ("scores_fwd_kernel, in-batch negatives, levelled, ranks", "bf16", "sm_90"),
        ("stored_bwd_logits_kernel, in-batch negatives, tiles of 64", "bf16", "sm_90"),
        ("levelled_bwd_kernel, tiles of 64", "bf16", "sm_90"),
    ],
)
def test_a_few_binaries(name, dtype, target):
    (case,) = [
        case for case in collect(MODULE) if case.name == name and target in case.targets and dtype in case.dtypes
    ]
    made = compile_case(case, dtype, target)
    made.check()
    assert made.gate
    assert case.spills == 0
    assert case.tensor_cores == (kit.TARGETS[target].tensor_core in made.instructions)


@pytest.mark.slow
@pytest.mark.compile_matrix(MODULE, targets=NVIDIA)
def test_binaries(compiled):
    compiled.check()


def test_every_kernel_and_loss_is_compiled_for_every_gpu():
    from cosup_fast.kernels.softmax_xent import kernels_product, kernels_rows

    modules = kernels_product, kernels_rows
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    for target in FULL:
        assert {case.kernel.fn.__name__ for case in collect(MODULE) if target in case.targets} == kernels
    products = [case for case in collect(MODULE) if case.name.startswith("scores_")]
    for target in TARGETS:
        names = {case.name.split(", ", 1)[1] for case in products if target in case.targets}
        assert set(LOSSES) <= names
        assert all(case.tensor_cores for case in products if "bf16" in case.dtypes)
