"""What the parts of the command line share: consoles, common arguments, loading a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field
from rich.markup import escape

from cosup_fast.data.strict import Strict
from cosup_fast.terminal import SafeConsole

if TYPE_CHECKING:
    from cosup_fast.config import RunConfig
    from cosup_fast.generation import GenerationConfig
    from cosup_fast.model import CoSupervisionModel

# What is printed is mostly other people's text: it is never read as markup or emoji codes.
out = SafeConsole(emoji=False)
err = SafeConsole(stderr=True, emoji=False)


def _resolved(checkpoint: Path) -> Path:
    from cosup_fast.data.sources import resolve_checkpoint

    return resolve_checkpoint(checkpoint)


Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint, a run's folder for its best or newest one, or cosup-smollm2.",
        show_default=False,
        callback=_resolved,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
IndexName = Annotated[
    str | None,
    typer.Option(help="the index: a folder, or milvus:URI#COLLECTION; default: index/ beside the checkpoint"),
]
Stale = Annotated[bool, typer.Option("--allow-stale", help="Use an index that another checkpoint made.")]


class Writing(Strict):
    """How Gen writes; what is not given is as in the `generation` section of the run's configuration."""

    max_new_tokens: int | None = Field(default=None, description="most tokens that Gen chooses")
    max_retrievals: int | None = Field(default=None, description="most retrievals of an answer; 0: no index is needed")
    ret_first: bool | None = Field(default=None, description="retrieve before the first word")
    ctx_truncate: bool | None = Field(default=None, description="drop a passage once its text is written")

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were given."""
        return self.model_dump(exclude_defaults=True)


def examples(*commands: str) -> str:
    """The end of a command's help: how it is used."""
    shown = (c if c.startswith("torchrun") else f"cosup-fast {c}" for c in commands)
    return f"Example{'s' if len(commands) > 1 else ''}: {' | '.join(shown)}"


def hush() -> None:
    """Silences what packages say at their import, of kernels for other machines."""
    for noisy in ("torch.utils._pytree", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def message_of(error: Exception) -> str:
    """A message for people, also of an option that pydantic refuses."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    from cosup_fast.config import explain

    return "\n".join(map(explain, error.errors()))


def say(text: str) -> None:
    """Prints a line as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def say_once(text: str) -> None:
    """Prints a line as it is, on rank 0 alone."""
    if leads():
        say(text)


def leads() -> bool:
    """Whether this process is rank 0 of those that torchrun started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def load_model(checkpoint: Path, device: str) -> CoSupervisionModel:
    """The model of a checkpoint, or of the one that a run's folder or a name stands for, its files verified first."""
    from cosup_fast.data.sources import resolve_checkpoint
    from cosup_fast.environment import choose_device
    from cosup_fast.model import CoSupervisionModel
    from cosup_fast.training.checkpoint import MANIFEST, chosen_checkpoint, verify

    folder = chosen_checkpoint(resolve_checkpoint(checkpoint))
    if (folder / MANIFEST).is_file():
        verify(folder)
    return CoSupervisionModel.load(folder, device=choose_device(device, "--device"))


def generation_config(
    checkpoint: Path, *, index: str | None = None, allow_stale: bool = False, **options: object
) -> GenerationConfig:
    """The `generation` section of the run that a checkpoint is of, with the options that were given.

    Raises:
        ValueError: an option has no such value, or would be ignored: what is about passages where none is retrieved,
            what is about sampling where nothing is sampled.
    """
    from cosup_fast.config import config_of
    from cosup_fast.generation import GenerationConfig

    run = config_of(checkpoint)
    base = run.generation if run else GenerationConfig()
    config = base.model_validate(base.model_dump() | options)
    if index is not None and not config.max_retrievals:
        raise ValueError(f"--index {index} is not searched where max_retrievals is 0: leave one of them out")
    given = {name for name, x in (options | {"allow_stale": allow_stale}).items() if x is not None and x is not False}
    for name in ("ctx_truncate", "candidates", "allow_stale") if not config.max_retrievals else ():
        if name in given:
            raise ValueError(
                f"--{name.replace('_', '-')} is about passages, and where max_retrievals is 0 there are none: leave "
                "one of them out"
            )
    for name in ("top_p", "seed") if config.temperature == 0 else ():
        if name in given:
            raise ValueError(
                f"--{name.replace('_', '-')} {options[name]} samples, and --temperature 0 does not: give a temperature "
                "above 0"
            )
    return config


def no_passages(query: object, k: int) -> list:
    """The index of a Gen that may not retrieve, which nothing searches."""
    raise AssertionError("max_retrievals=0 bans [NSP]")


def run_config(arguments: list[str]) -> RunConfig:
    """The configuration of `[CONFIG.yaml] [section.field=value]...`."""
    from cosup_fast.config import ConfigError, load_config

    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"expected one configuration file, got {files}: overrides read section.field=value")
    return load_config(files[0] if files else None, [a for a in arguments if "=" in a])


@contextmanager
def interruptible(otherwise: str = "", then: str = "") -> Iterator[None]:
    """Ctrl-C or SIGTERM inside ends the command with status 130, and says how far the work came.

    Args:
        otherwise: the message where the interruption itself has none.
        then: how to continue.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        text = (str(interrupt) or otherwise) + then
        if leads():
            err.print(f"[yellow]interrupted:[/] {escape(text)}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
