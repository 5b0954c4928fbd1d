"""Examples to packs: sequences laid end to end, with where each one ends, and who asks for which passage.

Shapes: T tokens of a pack, S sequences in it, N queries ([NSP] tokens), M distinct passages of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import Template


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
        moved = {
            f.name: x.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(x := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class CoSupervisionBatch:
    """What one training step reads. A passage that several queries ask for is encoded once."""

    gen: Pack
    labels: Tensor  # (T,) int64, already shifted, -100 where nothing is learnt
    query_rows: Tensor  # (N,) int64, rows of the pack that hold [NSP]
    positive: Tensor  # (N,) int64, the row among the passages that answers each query
    passages: Pack | None  # M sequences for Embseq; None when no example has a retrieval

    def to(self, device: torch.device) -> CoSupervisionBatch:
        """The batch with its tensors on `device`."""
        return CoSupervisionBatch(
            self.gen.to(device),
            self.labels.to(device, non_blocking=True),
            self.query_rows.to(device, non_blocking=True),
            self.positive.to(device, non_blocking=True),
            self.passages and self.passages.to(device),
        )


def make_batch(examples: Sequence[Example], corpus: dict[str, Passage], template: Template) -> CoSupervisionBatch:
    """Tokenizes and packs examples with the passages they ask for.

    Raises:
        ValueError: no example, or what `Template.gen_sequence` and `Template.sequence` refuse.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    sequences = [template.gen_sequence(example, corpus) for example in examples]
    starts = accumulate((len(s.input_ids) for s in sequences[:-1]), initial=0)
    wanted = [passage for s in sequences for passage in s.query_passages]
    row_of = {passage: row for row, passage in enumerate(dict.fromkeys(wanted))}
    return CoSupervisionBatch(
        gen=Pack.of([s.input_ids for s in sequences]),
        labels=torch.tensor([label for s in sequences for label in s.labels]),
        query_rows=torch.tensor(
            [start + row for start, s in zip(starts, sequences) for row in s.query_rows], dtype=torch.int64
        ),
        positive=torch.tensor([row_of[passage] for passage in wanted], dtype=torch.int64),
        passages=Pack.of([template.sequence(corpus[passage]) for passage in row_of]) if row_of else None,
    )
