"""`cosup-fast train`: train Gen and Embseq together."""

from __future__ import annotations

from typing import Annotated

import typer

from cosup_fast.cli.common import err, interruptible, run_config, say_once


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [section.field=value]...", help="a configuration and overrides"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoint in the output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although the plan says that it does not fit.")] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the complete configuration with comments, and stop.")
    ] = False,
) -> None:
    """Train Gen and Embseq together; torchrun shares every step among processes."""
    from cosup_fast.config.describe import dump_commented

    config = run_config(arguments or [])
    if show and config.model.init_from is not None:
        from cosup_fast.training.initial import inherit

        config = inherit(config)
    if show:
        print(dump_commented(config), end="")
        return
    from cosup_fast.plan.fits import FitsIntoMemory
    from cosup_fast.training.run import run_training

    with interruptible(then="; continue with --resume"):
        checkpoint = run_training(config, resume=resume, callbacks=() if force else [FitsIntoMemory()], console=err)
    say_once(f"checkpoint: {checkpoint}")
