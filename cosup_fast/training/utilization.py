"""Model FLOP of a step, and the share of what the devices could do in that time (MFU, Chowdhery et al. 2022, PaLM).

    FLOP = sum over both models of b (2 P T + 2 L A sum_s l_s^2)  +  2 b V D S  +  6 N M D
    MFU  = FLOP / (seconds * peak * ranks)

P weights of the decoder layers' products, T tokens in sequences of l_s, L layers, A width of all heads together; V D
the head, on the S supervised tokens; N queries, M passages of width D. b is 3 for a model whose weights are trained, 2
where adapters alone are, 1 for a frozen one. Attention is causal: half of its square. What is computed a second time,
for activation checkpointing or in the first pass of a step of several packs, does not count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cosup_fast.data.packing import CoSupervisionBatch, Pack
from cosup_fast.model import CoSupervisionModel

PEAKS = {
    "A100": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "B200": 2250.0,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100 80GB HBM3": 989.5,
    "H200": 989.5,
    "L4": 121.0,
    "L40S": 362.0,
}
"""TFLOP/s of dense bf16 products, from NVIDIA's data sheets, by what the device's name begins with."""


def known_peak(name: str) -> float | None:
    """Peak TFLOP/s in bf16 of a device of this name; None where no data sheet is known.

    Names are those of `torch.cuda.get_device_name`: NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3, NVIDIA L4.
    """
    words = name.removeprefix("NVIDIA ").replace("-", " ")
    return next((peak for known, peak in PEAKS.items() if f"{words} ".startswith(f"{known} ")), None)


def peak_tflops(given: float | None, device: torch.device, *, half: bool) -> float | None:
    """The peak of a device: what was given, or its data sheet's where products are in bf16 (`half`); else None."""
    if given is not None or device.type != "cuda" or not half:
        return given
    return known_peak(torch.cuda.get_device_name(device))


class Utilization:
    """Model FLOP of batches, and the share of a peak; made before ranks share out the weights.

    Args:
        model: Gen and Embseq.
        peak: TFLOP/s of a device; None where that is not known, and there is no share.
    """

    def __init__(self, model: CoSupervisionModel, peak: float | None):
        self.gen = _Part(model.gen.base_model)
        of_embseq = model.gen.base_model if model.embseq is None else model.embseq
        self.embseq = _Part(of_embseq) if model.has_embseq else None
        config = model.gen.config.get_text_config()
        self._head = 2 * self.gen.passes * config.vocab_size * model.width if model.ntp.weight else 0
        self._width = model.width

        # Of mixtures of experts and of 4-bit weights the FLOP is not what the weights say.
        self.peak = peak if self.gen.known and (self.embseq is None or self.embseq.known) else None

    def flop(self, batch: CoSupervisionBatch) -> float:
        """Of a rank's part of a step."""
        flop = sum(self.gen(part.pack) + self._head * len(part.targets) for part in batch.gen)
        if self.embseq is not None:
            flop += sum(map(self.embseq, batch.passages))
            flop += 6 * batch.nsp_count * batch.step.passages * self._width
        return float(flop)

    def share(self, flop: float, seconds: float, ranks: int) -> float | None:
        """MFU of a step; None where it is not known."""
        return None if self.peak is None else flop / (seconds * self.peak * 1e12 * ranks)


class _Part:
    """One of both models."""

    def __init__(self, model: Any):
        config = model.config.get_text_config()
        looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up]
        heads = config.num_attention_heads
        self._weights = sum(p.numel() for p in matrices)
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.attention = 2 * config.num_hidden_layers * heads * head_width
        experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
        self.known = not experts and all(p.is_floating_point() for p in matrices)
        trained = [p.requires_grad for p in matrices]
        self.passes = 3 if all(trained) else 2 if any(trained) else 1

    def __call__(self, pack: Pack) -> float:
        lengths = pack.lengths[: pack.count]
        forward = 2 * self._weights * sum(lengths) + self.attention * sum(length**2 for length in lengths)
        return self.passes * forward
