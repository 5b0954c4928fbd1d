"""Configurations of models: those of the presets as plain numbers, any other one from its folder, file or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from cosup_fast.model.loading import keep_layers
from cosup_fast.model.pretrained import read_config

# Published sizes; a name stands for the same model on the hub.
_LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 32000}
_SHIPPED: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "tinyllama-1.1b": {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    },
    "smollm2-135m": {
        **_LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
_ALIASES = {
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "TinyLlama/TinyLlama_v1.1": "tinyllama-1.1b",
    "HuggingFaceTB/SmolLM2-135M": "smollm2-135m",
}


def model_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The configuration of a model, as `AutoConfig.for_model` takes it; no weight is read.

    Args:
        name: llama2-7b, tinyllama-1.1b or smollm2-135m; a folder or a config.json; a prepared or Hugging Face name.
        layers: keep only the first ones.

    Raises:
        ValueError: it is none of these, cannot be read, or has fewer layers.
    """
    known = _ALIASES.get(name, name)
    path = Path(name)
    try:
        if known in _SHIPPED:
            config = AutoConfig.for_model(**_SHIPPED[known])
        elif path.suffix == ".json":
            config = AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
        else:
            config = read_config(name)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"there is no configuration {name!r} ({reason}): name a folder, a config.json, a Hugging Face model, or "
            f"one of {', '.join(_SHIPPED)}"
        ) from None
    if layers is not None:
        keep_layers(config, layers, name)
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("transformers_version", None)
    return values


def decoder(values: dict[str, Any]) -> Any:
    """The part of a configuration that describes the decoder layers, by the names that all models share."""
    return AutoConfig.for_model(**values).get_text_config()
