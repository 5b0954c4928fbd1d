"""Which examples make a step: a shuffle that depends on the seed alone and gives every step short and long ones alike.

Examples are sorted by a length blurred by up to a quarter, another blur every epoch, and dealt out like cards: each run
of neighbours gives one example to every step, in random order. So all steps have as many examples and nearly as many
tokens, which means equal time and memory, and an equal number of packs on every rank. A batch of equal lengths would
have neither, and its negatives would be told apart by their length. The blur lets examples of equal length meet, too.

Where the sets of data.train have weights, `Mixture` says which examples make an epoch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cosup_fast.data.packing import PackLimits, check_fits, make_batch
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import IGNORE, Template, TooLongError

BLUR = 0.25


@dataclass(frozen=True)
class Mixture:
    """Sets of examples with weights, and which of their examples an epoch draws.

    An epoch has as many draws N as there are examples. Set i of weight w_i makes up N w_i / sum(w) of them, rounded to
    whole numbers by the largest remainders. Each set is dealt out in shuffles of its own, one after the other and
    across epochs: no example comes again before all others of its set have come. The draws of an epoch depend on the
    seed and its number alone, so a run resumes from its step number.

    Args:
        sets: the number of the set that each example belongs to, from 0.
        weights: of each set, above 0.

    Raises:
        ValueError: a set has no example, or a weight too small for one example an epoch.
    """

    sets: Sequence[int]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        for number, (members, draws) in enumerate(zip(self._members, self.draws, strict=True)):
            weight = f"data.weights={list(self.weights)}: set {number} of data.train (counted from 0)"
            if not len(members):
                raise ValueError(f"{weight} has no example: omit it and its weight")
            if not draws:
                raise ValueError(f"{weight} gets less than one of the {len(self.sets)} examples of an epoch: raise it")

    @cached_property
    def draws(self) -> list[int]:
        """How many examples of an epoch each set makes up."""
        total = sum(self.weights)
        exact = [len(self.sets) * weight / total for weight in self.weights]
        counts = [math.floor(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: len(self.sets) - sum(counts)]:
            counts[i] += 1
        return counts

    def epoch(self, number: int, seed: int) -> Tensor:
        """The examples of an epoch, set by set: (N,) int64."""
        return torch.cat(
            [
                self._drawn(i, members, number * draws, (number + 1) * draws, seed)
                for i, (members, draws) in enumerate(zip(self._members, self.draws, strict=True))
            ]
        )

    @cached_property
    def _members(self) -> list[Tensor]:
        sets = torch.tensor(self.sets)
        return [torch.nonzero(sets == i).flatten() for i in range(len(self.weights))]

    def _drawn(self, number: int, members: Tensor, start: int, stop: int, seed: int) -> Tensor:
        """The draws from `start` to before `stop` of a set's shuffles laid end to end."""
        size = len(members)
        rounds = range(start // size, -(-stop // size))
        shuffled = [members[torch.randperm(size, generator=_generator(seed, number, r))] for r in rounds]
        first = rounds.start * size
        return torch.cat(shuffled)[start - first : stop - first]


class StepSampler:
    """The examples of each step.

    Args:
        lengths: tokens that each example brings.
        batch_size: most examples of a step; a step has one fewer where the number of examples asks for it.
        seed: of the whole run.
        balanced: as above; otherwise steps are slices of a plain permutation, the last of which may be short.
        mixture: which examples make an epoch; by default each comes once.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        balanced: bool = True,
        mixture: Mixture | None = None,
    ):
        self.lengths = torch.tensor(lengths, dtype=torch.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.balanced = balanced
        self.mixture = mixture
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._epoch, self._steps = -1, []

    def __getitem__(self, step: int) -> list[int]:
        """The examples of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._shuffle(epoch)
        return self._steps[position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = _generator(self.seed, epoch)
        count, steps = len(self.lengths), self.steps_per_epoch
        drawn = torch.arange(count) if self.mixture is None else self.mixture.epoch(epoch, self.seed)
        if not self.balanced:
            order = torch.randperm(count, generator=generator)
            return [part.tolist() for part in drawn[order].split(self.batch_size)]
        blur = torch.rand(count, dtype=torch.float64, generator=generator) * 2 - 1
        order = drawn[torch.argsort(self.lengths[drawn] * (1 + BLUR * blur), stable=True)]
        dealt: list[list[int]] = [[] for _ in range(steps)]
        for run in order.split(steps):
            for step, member in zip(torch.randperm(steps, generator=generator).tolist(), run.tolist()):
                dealt[step].append(member)
        return dealt


def draw_negatives(examples: Sequence[Example], count: int | None, seed: int, step: int) -> list[Example]:
    """The examples of a step with at most `count` of their hard negatives, which seed, step and id decide."""
    if count is None:
        return list(examples)
    return [
        example.model_copy(
            update={"negatives": random.Random(f"{seed}:{step}:{example.id}").sample(example.negatives, count)}
        )
        if len(example.negatives) > count
        else example
        for example in examples
    ]


def is_too_long(
    example: Example, corpus: Mapping[str, Passage], template: Template, limits: PackLimits, *, retrieval: bool
) -> bool:
    """Whether `make_batch` refuses an example for its length, or that of a passage it names."""
    try:
        make_batch([example], corpus, template, limits, retrieval=retrieval)
    except TooLongError:
        return True
    return False


def example_lengths(
    examples: Sequence[Example],
    corpus: Mapping[str, Passage],
    template: Template,
    limits: PackLimits | None = None,
    *,
    track: Callable[[Sequence[Example]], Iterable[Example]] = iter,
    ntp: bool = True,
    retrieval: bool = True,
    negatives: int | None = None,
    too_long: list[str] | None = None,
) -> list[int]:
    """The tokens that each example brings to both models; everything is tokenized once and checked.

    Args:
        examples, corpus, template: as of `make_batch`.
        limits: of the packs that are to hold them.
        track: wraps the examples, to show progress.
        ntp: whether next tokens are learnt; then there must be a supervised one.
        retrieval: whether passages are embedded and learnt; then there must be a query.
        negatives: how many hard negatives of an example a step reads; None: all.
        too_long: where given, examples that are too long are not refused: they have length 0, and why is put in here.

    Raises:
        ValueError: no example, what `make_batch` refuses of any one, or nothing in them for a loss to learn.
    """
    if not examples:
        raise ValueError("there is no training example: data.train names an empty set")
    limits = limits or PackLimits()
    of_passage: dict[str, int] = {}
    lengths: list[int] = []
    supervised = queries = 0

    def measured(name: str) -> int:
        if name not in of_passage:
            length = len(template.sequence(corpus[name]))
            check_fits(f"passage {name!r}", length, limits)
            of_passage[name] = length
        return of_passage[name]

    for example in track(examples):
        try:
            sequence = template.gen_sequence(example, corpus)
            check_fits(f"example {example.id!r}", len(sequence.input_ids), limits)
            asked = set(sequence.query_passages) if retrieval else set()
            others = set(example.negatives) - asked if retrieval else set()
            length = len(sequence.input_ids) + sum(map(measured, asked))
            read = len(others) if negatives is None else min(negatives, len(others))
            length += sum(map(measured, others)) * read // max(1, len(others))
        except TooLongError as error:
            if too_long is None:
                raise
            too_long.append(str(error))
            lengths.append(0)
            continue
        supervised += sum(label != IGNORE for label in sequence.labels)
        queries += len(sequence.query_rows)
        lengths.append(length)
    if too_long and not any(lengths):
        raise ValueError(f"all of the {len(examples)} examples of data.train are too long: {too_long[0]}")
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


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) that the parts decide. Every bit depends on all of them: torch reads only 32 on a CPU."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _generator(*numbers: int) -> torch.Generator:
    """Random numbers that these numbers decide."""
    return torch.Generator().manual_seed(seed_of(*numbers))
