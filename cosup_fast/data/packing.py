"""Examples to packs: sequences laid end to end, with where each one ends, and who asks for which passage.

Shapes: T tokens of a pack, S sequences in it, N queries ([NSP] tokens), M distinct passages of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Self, TypeVar

import torch
from torch import Tensor

from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import Template

R = TypeVar("R", "Pack", "CoSupervisionBatch")


@dataclass(frozen=True)
class Pack:
    """Sequences laid end to end, no pad token anywhere."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, restarts at 0 with every sequence
    cu_seqlens: Tensor  # (S + 1,) int32, cumulative lengths from 0 to T
    lengths: tuple[int, ...]  # S lengths, on the host so that nothing waits for a device

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Self:
        """Packs token lists; an empty list, or an empty sequence, is a ValueError."""
        lengths = tuple(len(sequence) for sequence in sequences)
        if not lengths or min(lengths) == 0:
            raise ValueError(f"a pack needs sequences of at least one token, got lengths {lengths}")
        return cls(
            input_ids=torch.tensor([token for sequence in sequences for token in sequence]),
            position_ids=torch.cat([torch.arange(length) for length in lengths]),
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            lengths=lengths,
        )

    @property
    def last_rows(self) -> Tensor:
        """The row of each sequence's last token: (S,) int64."""
        return self.cu_seqlens[1:].long() - 1

    def to(self, device: torch.device) -> Self:
        """The pack with its tensors on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class CoSupervisionBatch:
    """What one training step reads. Passages with the same tokens are one passage, encoded once.

    The passages are those that the queries ask for, then the hard negatives of the examples.
    The ids are there only where some query has positives besides `positive`: see `make_batch`.
    """

    gen: Pack
    labels: Tensor  # (T,) int64, already shifted, -100 where nothing is learnt
    query_rows: Tensor  # (N,) int64, rows of the pack that hold [NSP]
    positive: Tensor  # (N,) int64, the row among the passages that answers each query
    passages: Pack | None  # M sequences for Embseq; None when no example has a retrieval
    key_ids: Tensor | None = None  # (M,) int64, an id for each passage
    positive_ids: Tensor | None = None  # (N, P) int64, ids of the further positives of each query, then -1

    def to(self, device: torch.device) -> Self:
        """The batch with its tensors on `device`."""
        return _moved(self, device)


def make_batch(examples: Sequence[Example], corpus: dict[str, Passage], template: Template) -> CoSupervisionBatch:
    """Tokenizes and packs examples with the passages they ask for and with their hard negatives.

    Every passage is a candidate of every query: one example's hard negative is every query's. A passage that is known
    to answer a query is no negative of it: the positives of a query are the passage that its [NSP] asks for and those
    of `Example.gold` in the batch that no other [NSP] of the example asks for.

    Raises:
        ValueError: no example, or what `Template.gen_sequence` and `Template.sequence` refuse.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    sequences = [template.gen_sequence(example, corpus) for example in examples]
    starts = accumulate((len(s.input_ids) for s in sequences[:-1]), initial=0)
    wanted = [corpus[name] for s in sequences for name in s.query_passages]
    row_of_tokens: dict[tuple[int, ...], int] = {}
    row_of: dict[tuple[str, str], int] = {}  # by content: two ids may stand for the same text
    hard = [corpus[name] for example in examples for name in example.negatives] if wanted else []
    for passage in [*wanted, *hard]:
        if _content(passage) not in row_of:
            tokens = tuple(template.sequence(passage))
            row_of[_content(passage)] = row_of_tokens.setdefault(tokens, len(row_of_tokens))
    further: list[list[int]] = []
    for example, s in zip(examples, sequences, strict=True):
        gold = {row_of.get(_content(corpus[name])) for name in example.gold if name in corpus}
        asked = {row_of[_content(corpus[name])] for name in s.query_passages}
        further += [sorted(row for row in gold - asked if row is not None)] * len(s.query_passages)
    most = max(map(len, further), default=0)
    return CoSupervisionBatch(
        gen=Pack.of([s.input_ids for s in sequences]),
        labels=torch.tensor([label for s in sequences for label in s.labels]),
        query_rows=torch.tensor(
            [start + row for start, s in zip(starts, sequences) for row in s.query_rows], dtype=torch.int64
        ),
        positive=torch.tensor([row_of[_content(passage)] for passage in wanted], dtype=torch.int64),
        passages=Pack.of(list(row_of_tokens)) if row_of_tokens else None,
        key_ids=torch.arange(len(row_of_tokens)) if most else None,
        positive_ids=torch.tensor([rows + [-1] * (most - len(rows)) for rows in further]) if most else None,
    )


def _content(passage: Passage) -> tuple[str, str]:
    return passage.title, passage.text


def _moved(record: R, device: torch.device) -> R:
    """A dataclass of tensors, with every tensor on `device`."""
    moved = {
        f.name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x.to(device)
        for f in fields(record)
        if isinstance(x := getattr(record, f.name), Tensor | Pack)
    }
    return replace(record, **moved)
