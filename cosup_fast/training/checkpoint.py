"""Checkpoints that are whole or absent: written under a temporary name, hashed, flushed, then renamed.

    step-000100/
      gen/ embseq/            Hugging Face folders: configuration, safetensors, tokenizer
      cosup.json heads.safetensors   what joins them (`CoSupervisionModel.save`)
      optimizer/rank-00000.safetensors   its states and random number generators, one file a rank
      trainer.json            step, schedule, what the steps have shown, and what the tensors of each rank are
      manifest.json           size and SHA-256 of every other file

best.json beside them names the best one by `training.keep_best`, which is never removed. Anything else there is not
ours and is left alone.

Nothing here is a pickle. Weights that ranks have shared out are gathered one by one, and each rank writes some of them:
a checkpoint is a Hugging Face folder at once, and knows no number of ranks. Copies are made before training continues;
files are written beside it, by a thread of each rank. When all are done, rank 0 gives the folder its name.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosup_fast.distributed import Peers
from cosup_fast.errors import CosupError
from cosup_fast.files import (
    FolderKind,
    check_manifest,
    described,
    install_folder,
    read_checked,
    read_object,
    remove_unfinished,
    sync,
    usual_mode,
    write_checked,
    write_manifest,
)
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.folder import copied_weights, save_folder
from cosup_fast.training.optimizer_state import SavedStates, load_states, save_states
from cosup_fast.training.optimizers import LocalOptimizer
from cosup_fast.training.sharding import reshard
from cosup_fast.training.step import random_state, set_random_state

MANIFEST = "manifest.json"
CHECKPOINT = FolderKind("a checkpoint", "cosup.json", frozenset({"format_version", "shared"}), ("*",))
REMEDY = "remove this checkpoint, then --resume continues from the one before"
BEST = "best.json"
_PREFIX = "step-"


class CheckpointError(CosupError, ValueError):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, while training continues.

    Every method but `busy` is a collective of the ranks.

    Args:
        root: where the checkpoints are; one folder for all ranks.
        keep: how many stay.
        peers: the ranks that train.
        on_saved: called on rank 0 with every checkpoint, once it is whole.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        peers: Peers | None = None,
        on_saved: Callable[[Path], None] = lambda checkpoint: None,
    ):
        self.root, self.keep, self.peers = root, keep, peers
        self._on_saved = on_saved
        self.rank, self.ranks = (0, 1) if peers is None else (peers.rank, peers.size)
        self.pending: int | None = None
        """The step whose checkpoint is being written."""
        self._best: int | None = None
        self._extra = 0
        self._thread: threading.Thread | None = None
        self._files: dict[str, dict[str, Any]] = {}
        self._error: str | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def mark_best(self, step: int) -> None:
        """Names the checkpoint of a step, written already or next, as the best; it stays until there is a better one.

        Raises:
            CheckpointError: best.json cannot be written.
        """
        self._best = step
        problem = None
        if self.rank == 0 and is_checkpoint(checkpoint_folder(self.root, step)):
            try:
                self._tidy()
            except OSError as error:
                problem = _not_written(error)
        self._agree(self.root / BEST, problem)

    def start(
        self,
        step: int,
        model: CoSupervisionModel,
        optimizer: LocalOptimizer,
        *,
        state: Mapping[str, Any] | None = None,
        extra: int = 0,
    ) -> None:
        """Copies everything and begins to write; `finish` must follow.

        Args:
            step, model, optimizer: what is written.
            state: what else the trainer needs, as JSON; `load_trainer_state` gives it back.
            extra: how many checkpoints more than `keep` stay.

        Raises:
            CheckpointError: the disk is full or not writable, or there is a whole checkpoint of that step already. The
                checkpoints already there are untouched.
        """
        assert self.pending is None
        final, folder = checkpoint_folder(self.root, step), self._folder(step)
        problem = None
        if self.rank == 0:
            problem = self._prepare(final, folder, model)
        self._agree(final, problem)
        random = {f"random/{name}": x for name, x in random_state(model.device).items()}
        states = save_states(optimizer, self.rank)
        reshard(model)  # a pass without a backward one, as of a frozen Embseq, leaves some of its weights whole
        weights = copied_weights(model, self.rank, self.ranks)
        every = self._gathered({"step": step, "parameters": states.parameters})
        trainer = json.dumps({**(state or {}), "step": step, "ranks": [one["parameters"] for one in every]}) + "\n"

        def write() -> None:
            try:
                if self.rank == 0:
                    (folder / "trainer.json").write_text(trainer)
                    self._finished(folder, "trainer.json")
                files = {f"optimizer/rank-{self.rank:05d}.safetensors": {**states.tensors, **random}, **weights}
                for name, tensors in files.items():
                    save_file(tensors, folder / name, metadata={"format": "pt"})
                    self._finished(folder, name)
            except Exception as error:  # safetensors reports a full disk as an error of its own, not as an OSError
                self._error = _not_written(error)

        self.pending, self._extra, self._files, self._error = step, extra, {}, None
        self._thread = threading.Thread(target=write, daemon=True, name=f"checkpoint {step}")
        self._thread.start()

    def finish(self) -> Path:
        """Waits for the files, gives the folder its name and removes the oldest checkpoints.

        Raises:
            CheckpointError: a file could not be written, on any rank.
        """
        assert self._thread is not None
        assert self.pending is not None
        self._thread.join()
        step, self.pending = self.pending, None
        final, folder = checkpoint_folder(self.root, step), self._folder(step)
        files = self._gathered({"files": self._files, "problem": self._error})
        problem = next((one["problem"] for one in files if one["problem"]), None)
        if self.rank == 0 and problem is None:
            problem = self._install(final, folder, {k: v for one in files for k, v in one["files"].items()})
        elif self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._agree(final, problem)
        if self.rank == 0:
            self._on_saved(final)
        return final

    def _folder(self, step: int) -> Path:
        final = checkpoint_folder(self.root, step)
        return final.with_name(f".{final.name}.new")

    def _prepare(self, final: Path, folder: Path, model: CoSupervisionModel) -> str | None:
        if (final / MANIFEST).is_file():
            return "is there already, from another run: choose another output, or remove it"
        try:
            remove_unfinished(self.root, f"{_PREFIX}*")
            (folder / "optimizer").mkdir(parents=True)
            save_folder(model, folder, weights=False)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            return _not_written(error)
        return None

    def _install(self, final: Path, folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
        """By rank 0: the manifest, and the name that makes a folder a checkpoint."""
        try:
            _index_weights(folder, files)
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.relative_to(folder).as_posix() not in files:
                    self._files = files
                    self._finished(folder, path.relative_to(folder).as_posix())
            write_manifest(folder / MANIFEST, dict(sorted(files.items())))
            for path in (p for p in folder.rglob("*") if p.is_dir()):
                sync(path)
            install_folder(folder, final, CHECKPOINT)
            self._tidy()
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            return _not_written(error)
        return None

    def _tidy(self) -> None:
        """Writes which checkpoint is the best, and removes the oldest of the others."""
        kept = checkpoints(self.root)[-self.keep - self._extra :]
        if self._best is not None and is_checkpoint(best := checkpoint_folder(self.root, self._best)):
            kept.append(best)
            write_checked(self.root / BEST, json.dumps({"step": self._best}))
        for old in checkpoints(self.root):
            if old not in kept:
                (old / MANIFEST).unlink()  # first: what is half removed is not a checkpoint
                shutil.rmtree(old)

    def _finished(self, folder: Path, name: str) -> None:
        path = folder / name
        usual_mode(path)
        sync(path)
        self._files[name] = described(path)

    def _gathered(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        return [note] if self.peers is None else self.peers.meet("checkpoint", note)

    def _agree(self, path: Path, problem: str | None) -> None:
        problem = next((one["problem"] for one in self._gathered({"problem": problem}) if one["problem"]), None)
        if problem is not None:
            raise CheckpointError(f"{path} {problem}")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"{_PREFIX}{step:06d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a finished checkpoint under the name of its step, and no copy of it or link to it."""
    step = re.fullmatch(rf"{_PREFIX}(\d+)", folder.name)
    named = step is not None and checkpoint_folder(folder.parent, int(step[1])) == folder
    return named and not folder.is_symlink() and (folder / MANIFEST).is_file()


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, whatever its folder is called.

    Raises:
        CheckpointError: it has no state of a trainer.
    """
    try:
        return int(read_object(checkpoint / "trainer.json", ["step"])["step"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} has no state of a trainer that can be read ({error}): {REMEDY}") from None


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in root.glob(f"{_PREFIX}*") if is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def chosen_checkpoint(folder: Path) -> Path:
    """The folder itself when it is a checkpoint; of a run's folder the best checkpoint where the run keeps one
    (`training.keep_best`), else the newest.

    Raises:
        CheckpointError: it is neither.
    """
    if (folder / "cosup.json").is_file():
        return folder
    root = folder / "checkpoints"
    found = checkpoints(root)
    if not found:
        raise CheckpointError(f"{folder} is neither a checkpoint nor the folder of a run with a finished checkpoint")
    if not (root / BEST).exists():
        return found[-1]
    try:
        best = checkpoint_folder(root, read_checked(root / BEST, ["step"])["step"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{error}: remove {root / BEST} for the newest checkpoint") from None
    if best not in found:
        raise CheckpointError(f"{root / BEST} names {best.name}, which is gone: name a checkpoint, such as {found[-1]}")
    return best


def verify(folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """Compares every file with the manifest, or this rank's share of them.

    Raises:
        CheckpointError: no manifest, or a file that is missing, truncated or altered.
    """
    try:
        check_manifest(folder / MANIFEST, rank=rank, ranks=ranks)
    except ValueError as error:
        raise CheckpointError(f"{error}: {REMEDY}") from None


def load_trainer_state(
    folder: Path,
    model: CoSupervisionModel,
    optimizer: LocalOptimizer,
    rank: int = 0,
    ranks: int = 1,
    *,
    warn: Callable[[str], None] = lambda message: None,
) -> tuple[int, dict[str, Any]]:
    """Restores optimizer and random number generators into place. The model is loaded already.

    A checkpoint of fewer ranks has no random numbers for `rank`: those stay as they are.

    Args:
        folder: the checkpoint.
        model, optimizer: as the run was started.
        rank, ranks: of this process, and how many there are now.
        warn: called with what is no longer the same to the bit.

    Returns:
        The step, and what `CheckpointWriter.start` was given as `state`.

    Raises:
        CheckpointError: it has no trainer's state, or that of other parameters.
    """
    try:
        description = read_object(folder / "trainer.json", ["step", "ranks"])
        files = [folder / "optimizer" / f"rank-{r:05d}.safetensors" for r in range(len(description["ranks"]))]
        read = [_Tensors(path) for path in files]
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} has no state of a trainer that can be read ({error}): {REMEDY}") from None
    saved = [SavedStates(x, parameters) for x, parameters in zip(read, description["ranks"], strict=True)]
    try:
        again = load_states(optimizer, saved, rank)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    same = "8-bit optimizer states were quantized again" if again else "weights and optimizer states are the same"
    if len(saved) != ranks:
        warn(f"continuing with {ranks} ranks what {len(saved)} began: {same}, sums are rounded in another order")
    elif again:
        warn(f"the weights are shared out otherwise than before: {same}")
    if rank < len(read):
        random = {name.removeprefix("random/"): read[rank][name] for name in read[rank] if name.startswith("random/")}
        set_random_state(random, model.device)
    return description["step"], {name: x for name, x in description.items() if name not in ("step", "ranks")}


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for: a rank needs few of all that ranks saved."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _index_weights(folder: Path, files: dict[str, Any]) -> None:
    """The index that Hugging Face reads where a model's weights are in several files."""
    for part in ("gen", "embseq"):
        shards = sorted(name for name in files if name.startswith(f"{part}/model-"))
        if not shards:
            continue
        where: dict[str, str] = {}
        total = 0
        for name in shards:
            with open(folder / name, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            where |= dict.fromkeys(header, Path(name).name)
            total += sum(x["data_offsets"][1] - x["data_offsets"][0] for x in header.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _not_written(error: Exception) -> str:
    return f"was not written ({error}): free some space, or choose another output; earlier checkpoints are whole"
