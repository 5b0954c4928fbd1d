"""Loading the models that only evaluation needs: judges and fluency models; safetensors alone, never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cosup_fast.data.sources import resolve_model
from cosup_fast.model.loading import quiet_transformers


def load_pretrained(factory: Any, name: str, device: torch.device | str, role: str, **options: Any) -> tuple[Any, Any]:
    """A model in evaluation mode, in the dtype it was saved in, and its tokenizer.

    Args:
        factory: one of transformers' Auto classes.
        name: a prepared model, a folder or a Hugging Face name.
        device: where it runs.
        role: what the error calls it.
        options: for `from_pretrained`.

    Raises:
        ValueError: no such model, none of the factory's kind, weights that are no safetensors, or code of its own.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name)
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise ValueError(
            f"{role} {name!r} holds no *.safetensors; a pytorch_model.bin is a pickle, which may run code, and is "
            "never read: convert it once with transformers, from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        with quiet_transformers():
            model = factory.from_pretrained(
                source, dtype="auto", use_safetensors=True, trust_remote_code=False, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{role} {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer
