"""A model of a pretrained one's architecture and tokenizer whose weights are random: how much pretraining matters."""

from __future__ import annotations

from pathlib import Path

import torch

from cosup_fast.files import FolderKind, replace_folder
from cosup_fast.model.pretrained import read_config, read_tokenizer

SEED = 1
_KIND = FolderKind("a model", "config.json", files=("*",))


def random_weights(name: str, folder: Path, *, layers: int | None = None) -> Path:
    """Writes the model into a folder unless it is there, and returns that.

    Args:
        name: the pretrained model: a prepared name, a local folder or a Hugging Face name.
        folder: where it goes.
        layers: keep only the first layers of the architecture.
    """
    from transformers import AutoModelForCausalLM

    if (folder / "config.json").is_file():
        return folder
    config = read_config(name)
    if layers is not None:
        config.get_text_config().num_hidden_layers = layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    with replace_folder(folder, _KIND) as new:
        model.save_pretrained(new)
        read_tokenizer(name).save_pretrained(new)
    return folder
