"""What a run takes, whether that fits, how much larger its packs could be, and what would help if it does not.

The whole model is simulated once. What is asked beside that, the largest batch and each switch, is simulated with a few
layers and continued in a straight line: decoder layers are alike, so that the peak is linear in their number while it
stays in the same phase. Both run in processes of their own, next to each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Self

from cosup_fast.errors import CosupError
from cosup_fast.plan.configs import decoder
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.scaling import PassWeights, StepWeights
from cosup_fast.plan.time import StepTime, estimate_step

GIB = 2**30
FEW = (3, 6)
"""Decoder layers of the two simulations that a straight line goes through."""


class PlanError(CosupError, ValueError):
    """A step that cannot be simulated."""


@dataclass(frozen=True)
class Switch:
    """A change of the configuration and the peak with it."""

    setting: str
    peak_gib: float


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of one GPU, in GiB."""

    peak_gib: float
    breakdown_gib: dict[str, float]
    """Empty where a straight line does not lead to it."""
    phase: str
    margin_gib: float
    """For what is not simulated: CUDA context, NCCL, cuBLAS, scratch of attention kernels, fragmentation."""
    gpu_memory_gib: float
    fits: bool
    parameters: int
    trained: int
    exact: bool
    """Whether every layer was simulated, or a few and the rest by a straight line."""
    largest_batch: int | None
    """Times that the sequences of every pack fit, or nearly so many; None where not asked for or not even once."""
    advice: tuple[Switch, ...]
    step_time: StepTime | None
    weights: StepWeights
    """What a step sends of its models, see `scaling.step_traffic`."""

    def to_json(self) -> dict[str, Any]:
        """As `cosup-fast plan --json` prints it."""
        return {**asdict(self), "verdict": "fits" if self.fits else "does not fit"}


def margin(gpu_memory_gib: float) -> float:
    """GiB that are left to what is not simulated: 6, or a tenth of the memory where that is more."""
    return max(6.0, gpu_memory_gib / 10)


def make_plan(request: PlanRequest, gpu_memory_gib: float, *, quick: bool = False) -> MemoryPlan:
    """Simulates a run.

    Args:
        request: the run.
        gpu_memory_gib: of each GPU.
        quick: a few layers stand for all; nothing else is asked.

    Raises:
        PlanError: a simulation failed; the message ends with its last words.
    """
    depths = depths_of(request)

    def lines(simulator: Simulator, asked: Iterable[PlanRequest]) -> list[dict[str, Any]]:
        return [peak_line(lambda layers, one=one: simulator.ask(one, layers), depths) for one in asked]

    with Simulator() as others:
        if quick:
            return _plan(request, gpu_memory_gib, lines(others, [request])[0], exact=max(depths) <= FEW[1])
        changed = find_alternatives(request)
        with ThreadPoolExecutor(1) as pool, Simulator() as whole:
            waiting = pool.submit(whole.ask, request)
            guesses = lines(others, [request, _larger(request, 2), *changed.values()])
            answer = waiting.result()
        _check(answer)
        peaks = [guess.get("peak", sys.maxsize) for guess in guesses]  # what cannot be simulated helps nobody
        correction = answer["peak"] - peaks[0]  # the line is not the truth; what it says of a change is
        room = (gpu_memory_gib - margin(gpu_memory_gib)) * GIB

        def grown(times: int) -> int:
            return lines(others, [_larger(request, times)])[0].get("peak", sys.maxsize) + correction

        largest = largest_fitting(room, {1: answer["peak"], 2: peaks[1] + correction}, grown)
    advice = [
        Switch(setting, round((peak + correction) / GIB, 3)) for setting, peak in zip(changed, peaks[2:], strict=True)
    ]
    helpful = sorted((s for s in advice if s.peak_gib < 0.99 * answer["peak"] / GIB), key=lambda s: s.peak_gib)
    return _plan(request, gpu_memory_gib, answer, exact=True, largest=largest, advice=helpful)


def largest_fitting(room: float, known: dict[int, int], peak: Callable[[int], int]) -> int | None:
    """Nearly the most times that fit, given two peaks. The peak is convex in the times, so that secants fall short."""
    fitting = max((times for times, found in known.items() if found <= room), default=None)
    for _ in range(2):
        if fitting is None:
            return None
        low, high = sorted(known)[-2:]
        slope = max(1.0, (known[high] - known[low]) / (high - low))
        guess = int(low + (room - known[low]) // slope)
        if guess <= fitting:
            break
        known = {fitting: known[fitting], guess: peak(guess)}
        if known[guess] <= room:
            return guess
    return fitting


class Simulator:
    """A process of `simulate.py` that answers one request after the other."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self._errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cosup_fast.plan.simulate"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            process_group=0,  # Ctrl-C is for whoever asks, who then ends this process
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._errors.close()

    def ask(self, request: PlanRequest, layers: tuple[int, int] | None = None) -> dict[str, Any]:
        """The fields of `Simulated`; {"error": ...} for what could not be simulated.

        Raises:
            PlanError: the process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"request": request.model_dump(), "layers": layers}) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines()[-1:] or [f"exit status {self.process.wait()}"]
        raise PlanError(f"the simulation of this step failed: {words[0]}")


def _check(answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise PlanError(f"the simulation of this step failed: {answer['error']}")


def _plan(
    request: PlanRequest,
    memory: float,
    answer: dict[str, Any],
    *,
    exact: bool,
    largest: int | None = None,
    advice: Iterable[Switch] = (),
) -> MemoryPlan:
    _check(answer)
    peak = answer["peak"] / GIB
    return MemoryPlan(
        peak_gib=round(peak, 3),
        breakdown_gib={kind: round(size / GIB, 3) for kind, size in answer["breakdown"].items()},
        phase=answer["phase"],
        margin_gib=margin(memory),
        gpu_memory_gib=memory,
        fits=peak + margin(memory) <= memory,
        parameters=answer["parameters"],
        trained=answer["trained"],
        exact=exact,
        largest_batch=largest,
        advice=tuple(advice),
        step_time=estimate_step(request),
        weights=StepWeights(
            tuple(PassWeights(**one) for one in answer["weights"]["passes"]), answer["weights"]["whole"]
        ),
    )


def peak_line(ask: Callable[[tuple[int, int]], dict[str, Any]], depths: tuple[int, int]) -> dict[str, Any]:
    """The answer for models of these depths from those for a few layers; equally deep ones are grown together."""
    low, high = FEW
    deep = [i for i in (0, 1) if depths[i] > high]
    start = low if 0 in deep else depths[0], low if 1 in deep else depths[1]
    base = last = ask(start)
    steps: list[tuple[dict[str, Any], float]] = []
    for grown in [deep] if len(deep) == 2 and depths[0] == depths[1] else [[i] for i in deep]:
        last = ask((high if 0 in grown else start[0], high if 1 in grown else start[1]))
        steps.append((last, (depths[grown[0]] - low) / (high - low)))
    answers = [base, *(one for one, _ in steps)]
    if failed := next((one for one in answers if "error" in one), None):
        return failed

    def at(value: Callable[[dict[str, Any]], int]) -> int:
        return round(value(base) + sum(times * (value(one) - value(base)) for one, times in steps))

    kinds = sorted({kind for one in answers for kind in one["breakdown"]})
    parts = {kind: at(lambda one, kind=kind: one["breakdown"].get(kind, 0)) for kind in kinds}
    # The kinds of peaks in different phases are on no line, though the peaks may be.
    sound = min(parts.values()) >= 0
    return {
        "peak": at(lambda one: one["peak"]),
        "phase": last["phase"],
        "breakdown": parts if sound else {},
        "parameters": at(lambda one: one["parameters"]),
        "trained": at(lambda one: one["trained"]),
        "weights": {
            "passes": [
                {name: at(lambda one, i=i, name=name: one["weights"]["passes"][i][name]) for name in part}
                for i, part in enumerate(base["weights"]["passes"])
            ],
            "whole": at(lambda one: one["weights"]["whole"]),
        },
    }


def depths_of(request: PlanRequest) -> tuple[int, int]:
    """Decoder layers of Gen and of Embseq."""
    gen = decoder(request.gen).num_hidden_layers
    return gen, gen if request.embseq is None else decoder(request.embseq).num_hidden_layers


def _larger(request: PlanRequest, times: int) -> PlanRequest:
    return request.model_copy(
        update={
            "gen_sequences": request.gen_sequences * times,
            "embseq_sequences": request.embseq_sequences * times,
        }
    )


def find_alternatives(request: PlanRequest) -> dict[str, PlanRequest]:
    """Settings that take less memory than those asked for."""
    found: dict[str, dict[str, Any]] = {}
    in_4_bits = request.gen_lora.quantize or request.embseq_lora.quantize
    if request.activation_checkpointing != "full":
        found["training.activation_checkpointing=full"] = {"activation_checkpointing": "full"}
    if request.optimizer == "adamw" and request.dtype == "float32":
        found["training.optimizer=adamw-8bit"] = {"optimizer": "adamw-8bit"}
    if request.dtype == "float32" or request.optimizer == "adamw":
        found["model.dtype=bfloat16 training.optimizer=adamw-8bit-torchao"] = {
            "dtype": "bfloat16",
            "optimizer": "adamw-8bit-torchao",
        }
    if request.precision == "float32" and request.dtype == "float32":
        found["training.precision=bfloat16"] = {"precision": "bfloat16"}
    one_pass = request.gen_packs == request.embseq_packs == 1 and not request.shared
    if request.gpus == 1 and not request.optimizer_in_backward and one_pass:
        others = [f"training.{name}=null" for name in ("clip", "spike_factor", "diagnose_every")]
        others += ["training.sharding=none"] if request.sharding == "fsdp" else []
        setting = " ".join(["training.optimizer_in_backward=true", *others])
        found[setting] = {"optimizer_in_backward": True, "clip": False, "sharding": "none"}
    if request.gpus > 1 and request.sharding != "fsdp" and not in_4_bits:
        found["training.sharding=fsdp"] = {"sharding": "fsdp"}
    if request.gen_sequences > 1 and request.embseq_sequences > 1 and not request.optimizer_in_backward:
        found["packs of half the size (training.tokens_per_micro_batch)"] = {
            "gen_sequences": request.gen_sequences // 2,
            "embseq_sequences": request.embseq_sequences // 2,
            "gen_packs": 2 * request.gen_packs,
            "embseq_packs": 2 * request.embseq_packs,
        }
    return {setting: request.model_copy(update=update) for setting, update in found.items()}
