"""What is done to every decoder layer of a model: activations recomputed in the backward pass, and compilation.

    kind         kept of a layer's activations            forward products of a training step
    none         all                                       1x
    selective    products and attention, about half        1x; norms, activations and rotations are computed again
    full         the layer's input                         2x

Sources: Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv 2205.05198.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from cosup_fast.config.model import Recompute
from cosup_fast.model.attention import PACKED, packed_flash, packed_sdpa

# By name: which attention runs depends on the device and on what is installed.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_ATTENTION = ("_scaled_dot_product", "_flash_attn", "_flash_attention", "_varlen_attn", "_efficient_attention")


def recompute_activations(model: Any, kind: Recompute) -> None:
    """Activation checkpointing of every decoder layer; it takes effect in training mode."""
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    if kind != "none":
        # transformers 5.10 knows it by the older name
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(options)


def compile_layers(model: Any, name: str, *, fixed_shapes: bool) -> None:
    """Compiles every decoder layer, one graph for all of them and, unless shapes are fixed, for packs of any size.

    Attention over packs stays outside of the graphs: it reads the lengths of a pack, which change with every one.

    Raises:
        ValueError: the model has no decoder layers that transformers knows as such.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"training.compile=true finds no decoder layers in {name} ({type(model).__name__}): set it to false"
        )
    # Both models, with and without gradient, training or not, are variants of the same code.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for name, attention in zip(PACKED, (packed_sdpa, packed_flash), strict=True):
        AttentionInterface.register(name, torch.compiler.disable(attention))
    for layer in layers:
        layer.compile(dynamic=not fixed_shapes)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    name = op.name()
    kept = name.split(".")[0] in _PRODUCTS or any(part in name for part in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
