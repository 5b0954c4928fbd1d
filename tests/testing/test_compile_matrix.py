"""Binaries for GPUs that are not there: figures of clean kernels, planted faults, the command line."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")
tl = pytest.importorskip("triton.language")

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from cosup_fast.testing import CompileCase, collect, compile_case, compile_matrix, examples, interpret  # noqa: E402
from cosup_fast.testing.compile import TARGETS, combinations, main, markdown  # noqa: E402


@triton.jit
def greedy_kernel(x, y, B: tl.constexpr):
    """Holds more rows of fp32 than a thread has registers for."""
    o = tl.arange(0, B)
    b_x = tl.load(x + o[:, None] * B + o[None, :])
    b_y = b_x
    for _ in range(4):
        b_y = tl.exp(b_y) + tl.sum(b_y, 1)[:, None] * b_x
    tl.store(y + o[:, None] * B + o[None, :], b_y)


@triton.jit
def without_dot_kernel(x, y, B: tl.constexpr):
    o = tl.arange(0, B)
    b_x = tl.load(x + o[:, None] * B + o[None, :]).to(tl.float32)
    tl.store(y + o, tl.sum(b_x * b_x, 1).to(y.dtype.element_ty))


@triton.jit
def wide_kernel(x, y, K, B: tl.constexpr, BK: tl.constexpr):
    o, o_k = tl.arange(0, B), tl.arange(0, BK)
    b_y = tl.zeros((B, B), dtype=tl.float32)
    for i_k in range(0, K, BK):
        b_x = tl.load(x + o[:, None] * K + i_k + o_k[None, :])
        b_w = tl.load(x + o[None, :] * K + i_k + o_k[:, None])
        b_y = tl.dot(b_x, b_w, b_y)
    tl.store(y + o[:, None] * B + o[None, :], b_y)


@triton.jit
def broken_kernel(x, B: tl.constexpr):
    tl.store(x + tl.arange(0, B), undefined_name)  # noqa: F821


GREEDY = {
    "kernel": greedy_kernel,
    "signature": {"x": "*fp32", "y": "*fp32"},
    "constexprs": {"B": 64},
    "options": {"num_warps": 1},
}
WITHOUT_DOT = {
    "kernel": without_dot_kernel,
    "signature": {"x": "*{dtype}", "y": "*{dtype}"},
    "constexprs": {"B": 32},
    "tensor_cores": True,
}
WIDE = {
    "kernel": wide_kernel,
    "signature": {"x": "*{dtype}", "y": "*fp32", "K": "i32:16"},
    "constexprs": {"B": 128, "BK": 128},
    "options": {"num_warps": 8, "num_stages": 5},
}


def test_spills_are_found_and_can_be_allowed():
    made = compile_case(GREEDY, "fp32", "sm_90")
    assert made.registers > 200
    assert made.spills > 0
    assert made.problems == [f"{made.spills} bytes spilled, 0 allowed"]
    with pytest.raises(AssertionError, match=r"greedy_kernel in fp32 for sm_90: \d+ bytes spilled"):
        made.check()
    assert compile_case({**GREEDY, "spills": made.spills}, "fp32", "sm_90").ok


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_missing_tensor_core_is_found(target):
    (problem,) = compile_case(WITHOUT_DOT, "bf16", target).problems
    assert problem == f"no tensor-core instruction {TARGETS[target].tensor_core}"
    # No GPU of NVIDIA's has them for fp32.
    assert compile_case(WITHOUT_DOT, "fp32", "sm_80").ok


def test_too_much_shared_memory_is_found():
    made = compile_case(WIDE, "bf16", "sm_80")
    assert made.shared > made.shared_limit == 163 * 1024
    assert made.programs == 0
    assert f"{made.shared} bytes of shared memory, 166912 available" in made.problems


def test_programs_that_do_not_fit_on_a_multiprocessor_are_reported():
    made = compile_case({**WITHOUT_DOT, "tensor_cores": False, "programs": 17}, "bf16", "sm_80")
    assert made.programs is not None
    assert 0 < made.programs < 17
    assert made.problems == [f"{made.programs} programs fit on a multiprocessor, 17 are launched"]


def test_what_does_not_compile_is_reported():
    case = {"kernel": broken_kernel, "signature": {"x": "*fp32"}, "constexprs": {"B": 32}}
    (problem,) = compile_case(case, "fp32", "sm_90").problems
    assert problem.startswith("CompilationError")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["sm_91"]}, r"targets of wide_kernel holds \['sm_91'\]; known are sm_80"),
        ({"constexprs": {"B": 64}}, r"lack \['BK'\]"),
        ({"signature": {**WIDE["signature"], "z": "i32"}}, r"name \['z'\]"),
    ],
)
def test_declarations_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        CompileCase(**{**WIDE, **change})


def test_only_multiples_of_16_can_be_declared():
    with pytest.raises(ValueError, match="i32:8; only :16"):
        compile_case({**WIDE, "signature": {**WIDE["signature"], "K": "i32:8"}}, "bf16", "sm_80")


def test_the_interpreter_and_the_compiler_do_not_mix():
    with interpret(), pytest.raises(RuntimeError, match=r"leave interpret\(\) to compile"):
        compile_case(WIDE, "bf16", "sm_80")


def test_a_kernel_compiles_after_it_was_interpreted():
    with interpret():
        examples.logsumexp(torch.randn(4, 9))
    (case,) = [case for case in collect(examples) if case.name == "logsumexp_fwd_kernel"]
    assert compile_case(case, "fp32", "sm_80").ok


def test_examples_compile():
    for case, dtype, target in combinations(collect(examples), ["sm_90", "sm_100"]):
        if dtype != "bf16":
            continue
        made = compile_case(case, dtype, target)
        made.check()
        assert made.registers > 8
        assert made.seconds > 0
        core = {"sm_90": "HGMMA", "sm_100": "tcgen05"}[target]
        assert (core in made.instructions) == ("matmul" in made.kernel)
        assert ("TMA load" in made.instructions) == ("descriptor" in made.kernel)


def test_what_is_not_the_loop_of_a_product_is_told_apart():
    made = compile_case(WIDE, "bf16", "sm_90")
    assert made.sass is not None
    assert made.epilogue is not None
    assert 0 < made.epilogue < made.sass
    without = compile_case(GREEDY, "fp32", "sm_90")
    assert without.sass is not None
    assert without.epilogue is None  # it has no product


@pytest.mark.slow
def test_examples_compile_for_every_target():
    results = compile_matrix(examples)
    assert {r.target for r in results} == set(TARGETS)
    assert [r for r in results if not r.ok] == []
    assert len(markdown(results).splitlines()) == len(results) + 2


def test_a_module_is_collected_by_name_and_a_package_with_its_modules(monkeypatch):
    module = types.ModuleType("module_with_cases")
    module.COMPILE_CASES = [WIDE, CompileCase(**{**WIDE, "name": "again"})]
    monkeypatch.setitem(sys.modules, "module_with_cases", module)
    assert [case.name for case in collect("module_with_cases")] == ["wide_kernel", "wide_kernel, again"]
    assert collect(["module_with_cases", module]) == 2 * collect(module)
    assert "softmax_fwd_kernel" in [case.name for case in collect("cosup_fast.testing")]
    collect()


def test_several_processes_compile_the_same():
    alone, shared = (compile_matrix(examples, ["sm_80"], kernel="softmax", jobs=jobs) for jobs in (1, 2))
    assert len(alone) == 2
    assert [(r.dtype, r.registers, r.instructions) for r in alone] == [
        (r.dtype, r.registers, r.instructions) for r in shared
    ]


def test_the_command_line(capsys, monkeypatch):
    arguments = ["cosup_fast.testing.examples", "--target", "sm_80", "--kernel", "softmax", "--format"]
    assert main([*arguments, "json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["kernel"], r["dtype"], r["target"]) for r in results] == [
        ("softmax_fwd_kernel", dtype, "sm_80") for dtype in ("bf16", "fp32")
    ]
    assert main([*arguments, "markdown"]) == 0
    assert capsys.readouterr().out.startswith("| kernel | dtype | target | registers |")
    assert main([*arguments, "table"]) == 0
    assert "softmax_fwd_kernel" in capsys.readouterr().out

    module = types.ModuleType("module_with_faults")
    module.COMPILE_CASES = [{**WITHOUT_DOT, "targets": ["sm_80", "gfx942"]}]
    monkeypatch.setitem(sys.modules, "module_with_faults", module)
    assert main(["module_with_faults", "--target", "sm_80", "--format", "markdown"]) == 1
    assert "FAIL: no tensor-core instruction HMMA" in capsys.readouterr().out
    # A target that is not a gate is reported.
    assert main(["module_with_faults", "--target", "gfx942", "--format", "markdown"]) == 0
    assert "reported: no tensor-core instruction MFMA" in capsys.readouterr().out
    assert main(["cosup_fast.testing.tolerance"]) == 0
    assert "no COMPILE_CASES in cosup_fast.testing.tolerance" in capsys.readouterr().err
