"""The examples that a run trains on: measured once, long ones left out where asked, sets mixed by their weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

from cosup_fast.config import RunConfig
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sampling import Mixture, example_lengths
from cosup_fast.data.template import Template


@dataclass(frozen=True)
class TrainingSet:
    """The examples that are trained on, measured."""

    examples: list[Example]
    lengths: list[int]
    mixture: Mixture | None
    left_out: int
    """Examples that were too long."""


def measure(
    template: Template,
    config: RunConfig,
    examples: Sequence[Example],
    sets: Sequence[int],
    corpus: Mapping[str, Passage],
    console: Console,
) -> TrainingSet:
    """Tokenizes everything once, so that what does not fit is refused before a model is loaded."""
    too_long: list[str] | None = [] if config.data.long_examples == "skip" else None
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:

        def track(examples: Sequence[Example]) -> Iterable[Example]:
            return progress.track(examples, description="checking lengths")

        lengths = example_lengths(
            examples,
            corpus,
            template,
            config.training.pack_limits,
            track=track,
            ntp=config.ntp.weight > 0,
            retrieval=config.has_embseq,
            negatives=config.data.negatives,
            too_long=too_long,
        )
    kept = [i for i, length in enumerate(lengths) if length]
    mixture = None
    if config.data.weights is not None:
        mixture = Mixture([sets[i] for i in kept], config.data.weights)
        shares = (f"{draws} of {name}" for draws, name in zip(mixture.draws, config.data.train, strict=True))
        console.print(f"an epoch: {', '.join(shares)}", markup=False)
    if too_long:
        console.print(
            f"left out {len(too_long)} of {len(examples)} training examples, which are too long: {too_long[0]}",
            markup=False,
        )
    return TrainingSet([examples[i] for i in kept], [lengths[i] for i in kept], mixture, len(examples) - len(kept))
