"""Loading the models that only evaluation needs: judges and fluency models; safetensors alone, never remote code."""

from __future__ import annotations

from typing import Any

import torch

from cosup_fast.model.pretrained import read_model, read_tokenizer


def load_pretrained(factory: Any, name: str, device: torch.device | str, role: str, **options: Any) -> tuple[Any, Any]:
    """A model in evaluation mode, in the dtype it was saved in, and its tokenizer.

    Args:
        factory: one of transformers' Auto classes.
        name: a prepared model, a folder or a Hugging Face name.
        device: where it runs.
        role: what the error calls it.
        options: for `from_pretrained`.

    Raises:
        ValueError: no such model, none of the factory's kind, weights that are not safetensors, or code of its own.
    """
    try:
        model = read_model(factory, name, dtype="auto", **options)
        tokenizer = read_tokenizer(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{role} {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer
