"""Checkpoints that are whole or absent: written under a temporary name, hashed, flushed, then renamed.

    step-000100/
      gen/ embseq/            Hugging Face folders: configuration, safetensors, tokenizer
      cosup.json heads.safetensors   what joins them (`CoSupervisionModel.save`)
      trainer.json trainer.safetensors   step, optimizer state, random number generators of every rank
      manifest.json           size and SHA-256 of every other file

Nothing here is a pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cosup_fast.files import remove_unfinished, replace_folder, sha256
from cosup_fast.modeling import CoSupervisionModel

MANIFEST = "manifest.json"
REMEDY = "remove this checkpoint, then --resume continues behind the one before"
_PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


def save_checkpoint(
    root: Path,
    step: int,
    model: CoSupervisionModel,
    optimizer: torch.optim.Optimizer,
    random: Sequence[dict[str, Tensor]] = (),
    *,
    keep: int = 2,
) -> Path:
    """Writes `root/step-NNNNNN` and removes all but the `keep` newest.

    Args:
        root: where the checkpoints are.
        step, model, optimizer: what is written.
        random: what `random_state` says on every rank.
        keep: how many stay.

    Raises:
        CheckpointError: the disk is full or not writable, or there is a whole checkpoint of that step already. The
            checkpoints already there are untouched.
    """
    final = checkpoint_folder(root, step)
    if (final / MANIFEST).is_file():
        raise CheckpointError(f"{final} is there already, from another run: choose another output, or remove it")
    remove_unfinished(root, f"{_PREFIX}*")
    try:
        with replace_folder(final, "cosup.json") as folder:
            model.save(folder)
            _save_trainer_state(folder, step, model, optimizer, random or [random_state(model.device)])
            _write_manifest(folder)
    except Exception as error:  # safetensors reports a full disk as an error of its own, not as an OSError
        raise CheckpointError(
            f"checkpoint {final} was not written ({error}): free some space, or choose another output; "
            "earlier checkpoints are whole"
        ) from error
    for old in checkpoints(root)[:-keep]:
        (old / MANIFEST).unlink()  # first: what is half removed is no checkpoint
        shutil.rmtree(old)
    return final


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"{_PREFIX}{step:06d}"


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in root.glob(f"{_PREFIX}*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def newest(folder: Path) -> Path:
    """The folder itself when it is a checkpoint, else the newest finished checkpoint of the run in it.

    Raises:
        CheckpointError: it is neither.
    """
    if (folder / "cosup.json").is_file():
        return folder
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise CheckpointError(f"{folder} is neither a checkpoint nor the folder of a run with a finished checkpoint")
    return found[-1]


def verify(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: no manifest, or a file that is missing, truncated or altered.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no finished checkpoint: {MANIFEST} cannot be read ({error})") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {REMEDY}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, its manifest says {expected['bytes']}: {REMEDY}")
        if (found := sha256(path)) != expected["sha256"]:
            raise CheckpointError(f"{path} was altered (sha256 {found[:12]}…): {REMEDY}")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random number generators that training draws from, by name."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Goes back to what `random_state` said."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def load_trainer_state(folder: Path, model: CoSupervisionModel, optimizer: torch.optim.Optimizer, rank: int = 0) -> int:
    """Restores optimizer and random number generators into place; returns the step. The model is loaded already.

    A checkpoint of fewer ranks has no random numbers for `rank`: those stay as they are.
    """
    description = json.loads((folder / "trainer.json").read_text())
    tensors = load_file(folder / "trainer.safetensors")
    random = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}
    state: dict[str, Any] = {**description["optimizer"], **tensors}
    for name, p in model.named_parameters():
        if p.requires_grad and f"state.{name}.step" not in state:  # no gradient so far: the state AdamW starts from
            state[f"state.{name}.step"] = torch.zeros(())
            state[f"state.{name}.exp_avg"] = torch.zeros_like(p)
            state[f"state.{name}.exp_avg_sq"] = torch.zeros_like(p)
    set_optimizer_state_dict(
        model,
        optimizer,
        state,
        options=StateDictOptions(flatten_optimizer_state_dict=True),
    )
    prefix = f"rng.{rank}."
    if own := {name.removeprefix(prefix): x for name, x in random.items() if name.startswith(prefix)}:
        set_random_state(own, model.device)
    return description["step"]


def _save_trainer_state(
    folder: Path,
    step: int,
    model: CoSupervisionModel,
    optimizer: torch.optim.Optimizer,
    random: Sequence[dict[str, Tensor]],
) -> None:
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    tensors = {name: x.detach().cpu().contiguous() for name, x in state.items() if isinstance(x, Tensor)}
    tensors |= {f"rng.{rank}.{name}": x for rank, one in enumerate(random) for name, x in one.items()}
    save_file(tensors, folder / "trainer.safetensors")
    scalars: dict[str, Any] = {name: x for name, x in state.items() if not isinstance(x, Tensor)}
    (folder / "trainer.json").write_text(json.dumps({"step": step, "optimizer": scalars}, indent=1) + "\n")


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
