"""Which examples make a step: a shuffle that depends on the seed alone and gives every step short and long ones alike.

Examples are sorted by a length blurred by up to a quarter, another blur every epoch, and dealt out like cards: each run
of neighbours gives one example to every step, in random order. So all steps have as many examples and nearly as many
tokens, which means equal time and memory, and an equal number of packs on every rank. A batch of equal lengths would
have neither, and its negatives would be told apart by their length. The blur lets examples of equal length meet, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from cosup_fast.data.packing import PackLimits, check_fits
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import IGNORE, Template

BLUR = 0.25


class StepSampler:
    """The examples of each step.

    Args:
        lengths: tokens that each example brings.
        batch_size: most examples of a step; a step has one fewer where the number of examples asks for it.
        seed: of the whole run.
        balanced: as above; otherwise steps are slices of a plain permutation, the last of which may be short.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, balanced: bool = True):
        self.lengths = torch.tensor(lengths, dtype=torch.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.balanced = balanced
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._epoch, self._steps = -1, []

    def __getitem__(self, step: int) -> list[int]:
        """The examples of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._shuffle(epoch)
        return self._steps[position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        count, steps = len(self.lengths), self.steps_per_epoch
        if not self.balanced:
            order = torch.randperm(count, generator=generator)
            return [part.tolist() for part in order.split(self.batch_size)]
        blur = torch.rand(count, dtype=torch.float64, generator=generator) * 2 - 1
        order = torch.argsort(self.lengths * (1 + BLUR * blur), stable=True)
        dealt: list[list[int]] = [[] for _ in range(steps)]
        for run in order.split(steps):
            for step, member in zip(torch.randperm(steps, generator=generator).tolist(), run.tolist()):
                dealt[step].append(member)
        return dealt


def example_lengths(
    examples: Sequence[Example],
    corpus: Mapping[str, Passage],
    template: Template,
    limits: PackLimits | None = None,
    *,
    track: Callable[[Sequence[Example]], Iterable[Example]] = iter,
    ntp: bool = True,
    retrieval: bool = True,
) -> list[int]:
    """The tokens that each example brings to both models; everything is tokenized once and checked.

    Args:
        examples, corpus, template: as of `make_batch`.
        limits: of the packs that are to hold them.
        track: wraps the examples, to show progress.
        ntp: whether next tokens are learnt; then there must be a supervised one.
        retrieval: whether passages are embedded and learnt; then there must be a query.

    Raises:
        ValueError: no example, what `make_batch` refuses of any one, or nothing in them for a loss to learn.
    """
    if not examples:
        raise ValueError("there is no training example: data.train names an empty set")
    limits = limits or PackLimits()
    of_passage: dict[str, int] = {}
    lengths: list[int] = []
    supervised = queries = 0
    for example in track(examples):
        sequence = template.gen_sequence(example, corpus)
        check_fits(f"example {example.id!r}", len(sequence.input_ids), limits)
        passages = {*sequence.query_passages, *example.negatives} if retrieval else set()
        for name in passages:
            if name not in of_passage:
                of_passage[name] = len(template.sequence(corpus[name]))
                check_fits(f"passage {name!r}", of_passage[name], limits)
        supervised += sum(label != IGNORE for label in sequence.labels)
        queries += len(sequence.query_rows)
        lengths.append(len(sequence.input_ids) + sum(of_passage[name] for name in passages))
    if retrieval and not queries:
        raise ValueError(
            f"none of the {len(examples)} examples of data.train asks for a passage, so NSP has nothing to learn: "
            "ground a segment of their output on a passage, name their gold passages, or set nsp.weight=0 to train NTP "
            "alone"
        )
    if ntp and not supervised:
        raise ValueError(
            f"none of the {len(examples)} examples of data.train has a supervised token, so NTP has nothing to learn: "
            "give them an output, or a prompt (text.prompt) for it to follow"
        )
    return lengths
