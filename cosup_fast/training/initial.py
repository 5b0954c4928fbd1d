"""What a run begins with: pretrained models, or what it takes over from a checkpoint (`model.init_from`).

The weights decide most of `model`: both models, their layers, dtype and adapters. What is not given of `model`, `text`,
`ntp` and `nsp` is as the checkpoint was trained with it, the temperature as it was learnt.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from cosup_fast.config import ConfigError, RunConfig, config_of, explain
from cosup_fast.config.model import ModelConfig
from cosup_fast.data.sources import resolve_checkpoint
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.folder import Changes, read_description
from cosup_fast.model.loading import Base
from cosup_fast.training.checkpoint import chosen_checkpoint

DECIDED = ("gen", "embseq", "shared", "gen_layers", "embseq_layers", "dtype", "gen_lora", "embseq_lora")
"""Fields of `model` that the weights decide."""
OWN = {"init_from", "initial_weight", "ramp"}
"""Fields that each run has to itself."""


def inherit(config: RunConfig, saved: RunConfig | None = None) -> RunConfig:
    """The configuration with what it takes over filled in; the same where it starts from no checkpoint.

    Args:
        config: as it was given.
        saved: what this run wrote when it started, if it is resumed; the checkpoint may be gone then.

    Raises:
        ConfigError: there is no such checkpoint, it has no Embseq where one is needed, or a field is given that
            contradicts the weights.
    """
    if config.model.init_from is None:
        return config
    if saved is not None and saved.model.init_from == config.model.init_from:
        there, embseq_there = saved, True
    else:
        there, embseq_there = _trained_with(initial_checkpoint(config))

    def merged(name: str) -> dict[str, Any]:
        given = getattr(config, name)
        return getattr(there, name).model_dump() | given.model_dump(include=given.model_fields_set | OWN)

    sections = {name: merged(name) for name in ("model", "text", "ntp", "nsp")}
    with_embseq = sections["nsp"]["weight"] > 0
    if with_embseq and not embseq_there:
        raise ConfigError(
            f"model.init_from={config.model.init_from!r} is a Gen without an Embseq, and nsp.weight="
            f"{sections['nsp']['weight']} needs one: set nsp.weight=0, or start from a checkpoint that has both"
        )
    decided = {name for name in DECIDED if with_embseq or not name.startswith("embseq")}
    _check_decided(config.model, there.model, decided)
    sections["model"] |= there.model.model_dump(include=decided)
    if not with_embseq:  # what learns in an Embseq alone stays behind with it
        sections["model"]["embseq_lora"] = config.model.embseq_lora.model_dump()
        sections["nsp"]["learnable_temperature"] = config.nsp.learnable_temperature
    try:
        return RunConfig.model_validate(config.model_dump() | sections)
    except ValidationError as error:
        raise ConfigError("\n".join(map(explain, error.errors()))) from None


def initial_checkpoint(config: RunConfig) -> Path:
    """The folder of the checkpoint that a run starts from.

    Raises:
        ConfigError: there is none.
    """
    assert config.model.init_from is not None
    try:
        return chosen_checkpoint(resolve_checkpoint(Path(config.model.init_from)))
    except ValueError as error:
        raise ConfigError(f"model.init_from={config.model.init_from!r}: {error}") from None


def new_model(config: RunConfig, device: torch.device | str = "cpu") -> CoSupervisionModel:
    """The models before the first step: pretrained ones, or those of the checkpoint that the run starts from.

    What is new in them is drawn by the run's seed.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    torch.manual_seed(config.training.seed)
    if config.model.init_from is None:
        return CoSupervisionModel.from_pretrained(config.model, config.text, config.nsp, ntp=config.ntp, device=device)
    changes = Changes(config.text, config.nsp, config.ntp, config.models.freeze_embseq)
    return CoSupervisionModel.load(
        initial_checkpoint(config), device=device, attention=config.model.attention, merge=False, changes=changes
    )


def as_in(folder: Path, config: RunConfig) -> RunConfig:
    """The configuration with the models of a checkpoint by its own folders, for their sizes and tokenizers."""
    second = config.has_embseq and not config.model.shared
    models = {
        "gen": str(folder / "gen"),
        "embseq": str(folder / "embseq") if second else None,
        "gen_layers": None,
        "embseq_layers": None,
    }
    return config.model_copy(update={"model": config.model.model_copy(update=models)})


def _trained_with(folder: Path) -> tuple[RunConfig, bool]:
    """What a checkpoint was trained with, as far as that can be taken over, and whether it has an Embseq."""
    description = read_description(folder)
    run = config_of(folder)
    heads = folder / "heads.safetensors"
    try:
        learnt = load_file(heads).get("criterion.nsp.log_scale")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.init_from: {heads} cannot be read ({error}): use another checkpoint") from None
    nsp = {name: value for name, value in description["nsp"].items() if name not in OWN}
    if learnt is not None:
        nsp["temperature"] = math.exp(-float(learnt))
    model: dict[str, Any] = {
        "gen": str(folder / "gen"),
        "embseq": None if description["shared"] else str(folder / "embseq"),
        **{name: description[name] for name in ("shared", "freeze_embseq", "dtype")},
        **{f"{part}_lora": Base.model_validate(x).lora for part, x in description.get("adapters", {}).items()},
    }
    if run is not None:
        model |= {name: getattr(run.model, name) for name in DECIDED}
    has_embseq = description.get("has_embseq", True)
    sections = {"model": model, "text": description["text"], "ntp": description.get("ntp", {}), "nsp": nsp}
    return RunConfig.model_construct(
        **{name: RunConfig.model_fields[name].default.model_copy(update=x) for name, x in sections.items()}
    ), has_embseq


def _check_decided(given: ModelConfig, there: ModelConfig, decided: set[str]) -> None:
    for name in DECIDED:
        if name not in given.model_fields_set & decided:
            continue
        value, expected = getattr(given, name), getattr(there, name)
        if name == "embseq":
            value, expected = value or given.gen, expected or there.gen
        if value != expected:
            raise ConfigError(
                f"model.{name}={value!r}, but what model.init_from={given.init_from!r} holds was trained with "
                f"{expected!r}: omit model.{name}, or start from another checkpoint"
            )
