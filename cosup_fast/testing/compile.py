"""The compile matrix: every kernel x dtype x configuration compiled for GPUs that are not there, and read back.

A kernel module declares what it ships as plain data, so that it needs nothing of this package:

    COMPILE_CASES = [
        {
            "kernel": scores_fwd_kernel,
            "signature": {"x": "*{dtype}", "d_w": "tensordesc<{dtype}[BN, BK]>", "lse": "*fp32", "D": "i32:16"},
            "dtypes": ["bf16", "fp16"],
            "constexprs": {"BM": 128, "BN": 128, "BK": 64},
            "options": {"num_warps": 8, "num_stages": 4},
            "targets": ["sm_90"],
            "tensor_cores": True,
        },
    ]

`{dtype}` runs through `dtypes`, block shapes may name constexprs, ":16" marks an integer that is a multiple of 16;
pointers are taken as 16-byte aligned. `targets` defaults to all, `spills` (bytes) to 0, `programs` of a multiprocessor
to 1. `name` tells configurations of one kernel apart.

    python -m cosup_fast.testing.compile [module ...] [--target sm_90 ...] [--jobs 8] [--format table|markdown|json]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import multiprocessing
import pkgutil
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

from cosup_fast.testing.sass import disassemble, instruction_counts


@dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    backend: str
    arch: int | str
    shared: int
    """Bytes of shared memory (LDS) one program may use."""
    threads: int
    """Of a multiprocessor."""
    gate: bool
    """A kernel that fails here fails the matrix; elsewhere it is reported."""
    tensor_core: str
    """The key of this target's tensor-core instruction in `COUNTED`."""

    def gpu(self) -> Any:
        """The target as Triton names it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, 64 if self.backend == "hip" else 32)


TARGETS = {
    "sm_80": Target("cuda", 80, 163 * 1024, 2048, True, "HMMA"),
    "sm_86": Target("cuda", 86, 99 * 1024, 1536, True, "HMMA"),
    "sm_89": Target("cuda", 89, 99 * 1024, 1536, True, "HMMA"),
    "sm_90": Target("cuda", 90, 227 * 1024, 2048, True, "HGMMA"),
    "sm_100": Target("cuda", 100, 227 * 1024, 2048, True, "tcgen05"),
    "sm_120": Target("cuda", 120, 99 * 1024, 1536, True, "HMMA"),
    "gfx942": Target("hip", "gfx942", 64 * 1024, 2048, False, "MFMA"),
}
"""Shared memory of a block and threads of a multiprocessor from the CUDA C++ Programming Guide's table of technical
specifications, and CDNA3's ISA."""

COUNTED = {
    "HMMA": r"\b[HO]MMA\b",
    "HGMMA": r"\bHGMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "MFMA": r"\bv_mfma_\w+",
    "TMA load": r"\bUTMALDG\b",
    "TMA store": r"\bUTMASTG\b",
}
"""Instructions that are counted in the binary."""


@dataclass
class CompileCase:
    """One kernel in one configuration; see the module's docstring for the fields."""

    kernel: Any
    signature: Mapping[str, str]
    dtypes: Iterable[str] = ("bf16",)
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Iterable[str] = tuple(TARGETS)
    tensor_cores: bool = False
    spills: int = 0
    programs: int = 1
    """That are launched for each multiprocessor, and have to fit there at once."""
    name: str = ""

    def __post_init__(self) -> None:
        kernel = self.kernel.fn.__name__
        self.name = f"{kernel}, {self.name}" if self.name else kernel
        if unknown := set(self.targets) - set(TARGETS):
            raise ValueError(f"targets of {self.name} holds {sorted(unknown)}; known are {', '.join(TARGETS)}")
        wanted, given = set(self.kernel.arg_names), {*self.signature, *self.constexprs}
        if wanted != given:
            raise ValueError(
                f"signature and constexprs of {self.name} lack {sorted(wanted - given)} "
                f"and name {sorted(given - wanted)}, which it does not take"
            )

    def source(self, dtype: str) -> Any:
        """The case as `triton.compile` takes it."""
        from triton.compiler import ASTSource

        signature, attributes = {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            kind, _, multiple = self.signature.get(name, "constexpr").replace("{dtype}", dtype).partition(":")
            if multiple not in ("", "16"):
                raise ValueError(f"{name} of {self.name} is {kind}:{multiple}; only :16 means something to Triton")
            if kind.startswith("*") or multiple:
                attributes[(i,)] = [["tt.divisibility", 16]]
            if kind.startswith("tensordesc<"):
                head, _, block = kind.rstrip(">").rstrip("]").partition("[")
                sizes = [self.constexprs.get(size, size) for size in map(str.strip, block.split(","))]
                kind = f"{head}[{', '.join(map(str, sizes))}]>"
            signature[name] = kind
        return ASTSource(self.kernel, signature, dict(self.constexprs), attributes)


@dataclass
class Compiled:
    """What a binary is made of. Registers are per thread, bytes of spills are stores plus loads per thread."""

    kernel: str
    dtype: str
    target: str
    gate: bool
    registers: int = 0
    spills: int = 0
    shared: int = 0
    shared_limit: int = 0
    programs: int | None = None
    """That a multiprocessor has room for at once, on NVIDIA."""
    instructions: dict[str, int] = field(default_factory=dict)
    sass: int | None = None
    """Instructions of the whole kernel, on NVIDIA."""
    epilogue: int | None = None
    """The fewest of these from a tile's last tensor-core instruction to the next tile's first; see `sass`."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def check(self) -> None:
        """Raises AssertionError naming what is wrong with the binary."""
        if self.problems:
            raise AssertionError(f"{self.kernel} in {self.dtype} for {self.target}: {'; '.join(self.problems)}")


def compile_case(case: CompileCase | Mapping[str, Any], dtype: str, target: str) -> Compiled:
    """Compiles a case again, without a GPU and past Triton's cache, and reads the binary."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    case = case if isinstance(case, CompileCase) else CompileCase(**case)
    if not isinstance(case.kernel, JITFunction) or knobs.runtime.interpret:
        raise RuntimeError(
            f"{case.name} was imported for the interpreter; unset TRITON_INTERPRET and leave interpret() to compile"
        )
    goal, source = TARGETS[target], case.source(dtype)
    try:
        _, made = compile_source(source, case.name, dtype, target, dict(case.options))
    except Exception as error:
        made = Compiled(case.name, dtype, target, goal.gate, shared_limit=goal.shared)
        made.problems.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}")
        return made
    if made.spills > case.spills:
        made.problems.append(f"{made.spills} bytes spilled, {case.spills} allowed")
    if made.shared > goal.shared:
        made.problems.append(f"{made.shared} bytes of shared memory, {goal.shared} available")
    if made.programs is not None and made.programs < case.programs > 1:
        made.problems.append(f"{made.programs} programs fit on a multiprocessor, {case.programs} are launched")
    if case.tensor_cores and dtype in ("bf16", "fp16") and goal.tensor_core not in made.instructions:
        made.problems.append(f"no tensor-core instruction {goal.tensor_core}")
    return made


def compile_source(source: Any, name: str, dtype: str, target: str, options: dict[str, Any]) -> tuple[Any, Compiled]:
    """Triton's compiled kernel of a source, and what it is made of. `options` are those of a launch."""
    import triton
    from triton import knobs

    goal = TARGETS[target]
    log, start = io.StringIO(), time.perf_counter()
    with (
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        knobs.cache.scope(),
        tempfile.TemporaryDirectory() as cache,
        contextlib.redirect_stdout(log),
        warnings.catch_warnings(),
    ):
        # A launch takes the same default; Triton 3.9 announces that 3.10 changes it.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.cache.dir = cache
        binary = triton.compile(source, target=goal.gpu(), options=options)
    made = Compiled(name, dtype, target, goal.gate, shared_limit=goal.shared)
    made.seconds = time.perf_counter() - start
    made.shared = binary.metadata.shared
    if goal.backend == "cuda":
        assembly = disassemble(binary.asm["cubin"])
        made.registers, made.spills = _ptxas_figures(log.getvalue())
        made.programs = _programs(goal, made, binary.metadata)
        made.sass, made.epilogue = instruction_counts(assembly, COUNTED[goal.tensor_core])
    else:
        assembly = binary.asm["amdgcn"]
        made.registers, made.spills = _amd_figures(assembly)
    found = {name: len(re.findall(pattern, assembly)) for name, pattern in COUNTED.items()}
    made.instructions = {name: number for name, number in found.items() if number}
    return binary, made


def _ptxas_figures(log: str) -> tuple[int, int]:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise RuntimeError(f"ptxas reports no registers: {log.strip() or 'nothing'}")
    return max(registers), sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def _programs(target: Target, made: Compiled, metadata: Any) -> int:
    """How many programs a multiprocessor has registers, shared memory, threads and tensor memory for."""
    warps = metadata.num_warps
    # Registers are given to a warp in 256s; a program takes a KiB of shared memory beside its own.
    by_registers = 65536 // (warps * (-(-32 * made.registers // 256) * 256))
    by_shared = (target.shared + 1024) // (made.shared + 1024)
    by_threads = target.threads // (32 * warps)
    by_tensor_memory = 512 // max(1, getattr(metadata, "tmem_size", None) or 1)
    return min(by_registers, by_shared, by_threads, by_tensor_memory)


def _amd_figures(assembly: str) -> tuple[int, int]:
    def figure(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    return figure("vgpr_count"), 4 * (figure("vgpr_spill_count") + figure("sgpr_spill_count"))


def _listed(modules: str | ModuleType | Iterable[str | ModuleType]) -> list[str | ModuleType]:
    return [modules] if isinstance(modules, (str, ModuleType)) else list(modules)


def collect(modules: str | ModuleType | Iterable[str | ModuleType] = "cosup_fast.kernels") -> list[CompileCase]:
    """The COMPILE_CASES of modules; a package stands for all its modules and packages."""
    cases = []
    for item in _listed(modules):
        module = importlib.import_module(item) if isinstance(item, str) else item
        inner = [info.name for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}.")]
        for one in [module, *map(importlib.import_module, sorted(inner))]:
            for case in getattr(one, "COMPILE_CASES", []):
                cases.append(case if isinstance(case, CompileCase) else CompileCase(**case))
    return cases


def combinations(
    cases: Iterable[CompileCase], targets: Iterable[str] | None = None
) -> Iterator[tuple[CompileCase, str, str]]:
    """(case, dtype, target) for all dtypes and targets of each case."""
    wanted = list(TARGETS if targets is None else targets)
    if unknown := set(wanted) - set(TARGETS):
        raise ValueError(f"targets holds {sorted(unknown)}; known are {', '.join(TARGETS)}")
    for case in cases:
        for target in wanted:
            if target in case.targets:
                yield from ((case, dtype, target) for dtype in case.dtypes)


def compile_matrix(
    modules: str | ModuleType | Iterable[str | ModuleType] = "cosup_fast.kernels",
    targets: Iterable[str] | None = None,
    kernel: str = "",
    jobs: int = 1,
) -> list[Compiled]:
    """Compiles everything the modules declare, or the kernels whose name holds a text, in so many processes."""
    names = [item if isinstance(item, str) else item.__name__ for item in _listed(modules)]
    cases = {i: case for i, case in enumerate(collect(modules)) if kernel in case.name}
    places = {id(case): i for i, case in cases.items()}
    found = list(combinations(cases.values(), targets))
    with contextlib.ExitStack() as stack:
        if jobs == 1:
            results = (compile_case(*combination) for combination in found)
        else:
            pool = stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
            )
            # A kernel does not travel between processes; its place among the declarations does.
            results = pool.map(_compile_place, ((names, places[id(case)], *rest) for case, *rest in found))
        return list(_watched(results, len(found)))


@functools.cache
def _collected(names: tuple[str, ...]) -> list[CompileCase]:
    return collect(names)


def _compile_place(place: tuple[list[str], int, str, str]) -> Compiled:
    names, i, dtype, target = place
    return compile_case(_collected(tuple(names))[i], dtype, target)


def _watched(results: Iterable[Compiled], total: int) -> Iterator[Compiled]:
    """The results with a progress bar on a terminal."""
    if not sys.stderr.isatty() or not importlib.util.find_spec("rich"):
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, "compiling", total, console=Console(stderr=True))


COLUMNS = (
    "kernel", "dtype", "target", "registers", "spilled", "shared", "of", "SASS", "epilogue", "programs", "instructions",
    "seconds", "verdict",
)  # fmt: skip


def rows(results: Iterable[Compiled]) -> list[tuple[str, ...]]:
    out = []
    for r in results:
        instructions = ", ".join(f"{number} {name}" for name, number in r.instructions.items())
        verdict = "ok" if r.ok else ("FAIL: " if r.gate else "reported: ") + "; ".join(r.problems)
        figures = (r.registers, r.spills, r.shared, r.shared_limit, r.sass, r.epilogue, r.programs)
        texts = ("-" if n is None else f"{n:,}" for n in figures)
        out.append((r.kernel, r.dtype, r.target, *texts, instructions, f"{r.seconds:.1f}", verdict))
    return out


def markdown(results: Iterable[Compiled]) -> str:
    """A Markdown table of results."""
    lines = [COLUMNS, ("---",) * 3 + ("--:",) * 7 + ("---", "--:", "---"), *rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _print(results: list[Compiled], form: str) -> None:
    if form == "table" and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS)
        for row in rows(results):
            table.add_row(*row, style=None if row[-1] == "ok" else "red" if row[-1].startswith("FAIL") else "yellow")
        Console(width=None if sys.stdout.isatty() else 180).print(table)
    else:
        print(json.dumps([asdict(r) for r in results], indent=1) if form == "json" else markdown(results))


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when a binary for a gate target has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m cosup_fast.testing.compile", description="Compiles Triton kernels for GPUs that are not there."
    )
    parser.add_argument("module", nargs="*", default=["cosup_fast.kernels"], help="modules with COMPILE_CASES")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="compile for this one only")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at once")
    parser.add_argument("--format", choices=["table", "markdown", "json"], default="table")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed (its wheels are for Linux): pip install triton", file=sys.stderr)
        return 2
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; at least 1")
    results = compile_matrix(options.module, options.target, options.kernel, options.jobs)
    if not results:
        print(f"no COMPILE_CASES in {', '.join(options.module)}", file=sys.stderr)
        return 0
    _print(results, options.format)
    return int(any(r.gate and not r.ok for r in results))


if __name__ == "__main__":
    sys.exit(main())
