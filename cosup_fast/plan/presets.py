"""Runs that are known by name: what `cosup-fast plan --preset` plans, and `examples/` trains."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A configuration as overrides of the default one, and the machine that it is for."""

    gpus: int
    gpu_memory_gib: float
    settings: dict[str, Any]


_LLAMA2 = {"model.gen": "llama2-7b", "training.precision": "bfloat16", "training.activation_checkpointing": "full"}
_SHARDED = {**_LLAMA2, "training.sharding": "fsdp"}
_ROUNDED = {"model.dtype": "bfloat16", "training.optimizer": "adamw-8bit-torchao"}

PRESETS = {
    "llama2-7b-8x80g": Preset(8, 80, _SHARDED),
    "llama2-7b-8x80g-8bit": Preset(8, 80, {**_SHARDED, "training.optimizer": "adamw-8bit"}),
    "llama2-7b-8x80g-bf16": Preset(8, 80, {**_SHARDED, **_ROUNDED}),
    "llama2-7b-1x80g": Preset(
        1,
        80,
        {
            **_LLAMA2,
            **_ROUNDED,
            "training.optimizer_in_backward": True,
            "training.clip": None,
            "training.spike_factor": None,
            "training.diagnose_every": None,
        },
    ),
    "tinyllama-1x24g": Preset(1, 24, {**_LLAMA2, **_ROUNDED, "model.gen": "tinyllama-1.1b"}),
}
"""All with packs of Gen of 4 x 1024 tokens and packs of Embseq of 16 x 256 on each GPU."""
