"""Examples to packs: sequences laid end to end, with where each one ends, and who asks for which passage.

A batch is what one step contrasts. It is cut into packs, the micro-batches of Gen and, apart from them, of Embseq: one
pack each, or as many as keep within `PackLimits`. How it is cut changes no loss and no gradient.

Shapes: T tokens of a pack, S sequences in it, N queries ([NSP] tokens) and M distinct passages of the batch.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import IGNORE, GenSequence, Template

R = TypeVar("R", "Pack", "GenPack", "CoSupervisionBatch")


class PackLimits(NamedTuple):
    """How much goes into a pack.

    `fixed` fills every pack up to exactly `tokens`, so that shapes never change.
    """

    tokens: int | None = None
    sequences: int | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Pack:
    """Sequences laid end to end, no pad token anywhere unless a fixed size was asked for.

    A filler is more sequences behind the `count` real ones: attention keeps them apart and nothing reads them.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, restarts at 0 with every sequence
    cu_seqlens: Tensor  # (S + 1,) int32, cumulative lengths from 0 to T, filler included
    lengths: tuple[int, ...]  # S lengths, on the host so that nothing waits for a device
    count: int  # sequences that are no filler, the first ones

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], size: int | None = None) -> Self:
        """Packs token lists, filled up to `size` tokens if that is given.

        Raises:
            ValueError: no sequence, an empty one, or more than `size` tokens.
        """
        lengths = tuple(len(sequence) for sequence in sequences)
        if not lengths or min(lengths) == 0:
            raise ValueError(f"a pack needs sequences of at least one token, got lengths {lengths}")
        missing = 0 if size is None else size - sum(lengths)
        if missing < 0:
            raise ValueError(f"a pack of size={size} tokens cannot hold {sum(lengths)}: raise it, or pack fewer")
        # No piece of filler is longer than what the model reads anyway: positions and sliding windows take it.
        whole, rest = divmod(missing, max(lengths))
        filler = (max(lengths),) * whole + (rest,) * (rest > 0)
        return cls(
            input_ids=torch.tensor([token for sequence in sequences for token in sequence] + [0] * missing),
            position_ids=torch.cat([torch.arange(length) for length in lengths + filler]),
            cu_seqlens=torch.tensor([0, *accumulate(lengths + filler)], dtype=torch.int32),
            lengths=lengths + filler,
            count=len(lengths),
        )

    @property
    def last_rows(self) -> Tensor:
        """The row of each sequence's last token: (count,) int64."""
        return self.cu_seqlens[1 : self.count + 1].long() - 1

    @property
    def tokens(self) -> int:
        """Tokens that are no filler."""
        return sum(self.lengths[: self.count])

    def to(self, device: torch.device) -> Self:
        """The pack with its tensors on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class GenPack:
    """A pack of Gen's and what is learnt from its tokens."""

    pack: Pack
    supervised_rows: Tensor  # int64, rows with a label
    targets: Tensor  # int64, the token that follows each of them
    query_rows: Tensor  # int64, rows that hold [NSP]

    @classmethod
    def of(cls, sequences: Sequence[GenSequence], size: int | None = None) -> Self:
        """Packs training sequences, filled up to `size` tokens if that is given."""
        starts = list(accumulate((len(s.input_ids) for s in sequences[:-1]), initial=0))
        labelled = [
            (start + row, label)
            for start, s in zip(starts, sequences, strict=True)
            for row, label in enumerate(s.labels)
            if label != IGNORE
        ]
        rows, targets = zip(*labelled, strict=True) if labelled else ((), ())
        queries = [start + row for start, s in zip(starts, sequences, strict=True) for row in s.query_rows]
        return cls(Pack.of([s.input_ids for s in sequences], size), *map(_int64, (rows, targets, queries)))

    def to(self, device: torch.device) -> Self:
        """The pack with its tensors on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class CoSupervisionBatch:
    """What one training step reads. Passages with the same tokens are one passage, encoded once.

    Queries count over the packs of Gen in order, passages over those of Embseq: those that the queries ask for, and the
    hard negatives of the examples.
    """

    gen: tuple[GenPack, ...]
    passages: tuple[Pack, ...]  # for Embseq; none when no example has a retrieval
    positive: Tensor  # (N,) int64, the row among the passages that answers each query
    key_ids: Tensor  # (M,) int64, an id of each passage made from its tokens: the same in every process
    positive_ids: Tensor | None = None  # (N, P) int64, ids of the further positives of each query, then -1

    @property
    def ntp_count(self) -> int:
        """Supervised tokens."""
        return sum(len(part.targets) for part in self.gen)

    @property
    def nsp_count(self) -> int:
        """Queries."""
        return len(self.positive)

    @property
    def packs(self) -> list[Pack]:
        """Every pack, of both models."""
        return [*(part.pack for part in self.gen), *self.passages]

    @property
    def tokens(self) -> int:
        """Tokens of both models that are no filler."""
        return sum(pack.tokens for pack in self.packs)

    def to(self, device: torch.device) -> Self:
        """The batch with its tensors on `device`."""
        return _moved(self, device)


def make_batch(
    examples: Sequence[Example], corpus: dict[str, Passage], template: Template, limits: PackLimits | None = None
) -> CoSupervisionBatch:
    """Tokenizes and packs examples with the passages they ask for and with their hard negatives.

    Every passage is a candidate of every query: one example's hard negative is every query's. A passage that is known
    to answer a query is no negative of it: the positives of a query are the passage that its [NSP] asks for and those
    of `Example.gold` in the batch that no other [NSP] of the example asks for.

    Raises:
        ValueError: no example, what `Template.gen_sequence` and `Template.sequence` refuse, or a sequence that is
            longer than a pack.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    limits = limits or PackLimits()
    size = limits.tokens if limits.fixed else None
    unordered = [template.gen_sequence(example, corpus) for example in examples]
    for example, s in zip(examples, unordered, strict=True):
        check_fits(f"example {example.id!r}", len(s.input_ids), limits)
    gen_plan = plan_packs([len(s.input_ids) for s in unordered], limits)
    order = [member for pack in gen_plan for member in pack]
    sequences = [unordered[member] for member in order]
    wanted = [corpus[name] for s in sequences for name in s.query_passages]
    of_tokens: dict[tuple[int, ...], int] = {}
    of_content: dict[tuple[str, str], int] = {}  # two ids may stand for the same text
    hard = [corpus[name] for member in order for name in examples[member].negatives] if wanted else []
    for passage in [*wanted, *hard]:
        if _content(passage) not in of_content:
            tokens = tuple(template.sequence(passage))
            check_fits(f"passage {passage.id!r}", len(tokens), limits)
            of_content[_content(passage)] = of_tokens.setdefault(tokens, len(of_tokens))
    distinct = list(of_tokens)
    passage_plan = plan_packs([len(tokens) for tokens in distinct], limits)
    row_of = {member: row for row, member in enumerate(member for pack in passage_plan for member in pack)}
    ids = [_content_id(distinct[member]) for member in row_of]
    further: list[list[int]] = []
    for member in order:
        gold = {of_content.get(_content(corpus[name])) for name in examples[member].gold if name in corpus}
        asked = {of_content[_content(corpus[name])] for name in unordered[member].query_passages}
        rows = sorted(row_of[found] for found in gold - asked if found is not None)
        further += [[ids[row] for row in rows]] * len(unordered[member].query_passages)
    most = max(map(len, further), default=0)
    return CoSupervisionBatch(
        gen=tuple(GenPack.of([unordered[member] for member in pack], size) for pack in gen_plan),
        passages=tuple(Pack.of([distinct[member] for member in pack], size) for pack in passage_plan),
        positive=_int64([row_of[of_content[_content(passage)]] for passage in wanted]),
        key_ids=_int64(ids),
        positive_ids=_int64([found + [-1] * (most - len(found)) for found in further]) if most else None,
    )


def plan_packs(lengths: Sequence[int], limits: PackLimits) -> list[list[int]]:
    """Which sequence goes into which pack: few packs, of nearly equal size, the longest sequence of each first.

    First-fit decreasing says how many packs there are. Handing out the sequences again, the longest first and each to
    the emptiest pack, evens them out, unless that overflows one. Equal lengths come to lie side by side in a pack: on a
    CPU attention takes them in one go. Every sequence must fit a pack of its own.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    tokens, sequences = limits.tokens or sum(lengths), limits.sequences or max(1, len(lengths))
    packs: list[list[int]] = []
    room: list[int] = []
    for i in longest_first:
        fit = (k for k, left in enumerate(room) if left >= lengths[i] and len(packs[k]) < sequences)
        if (k := next(fit, None)) is None:
            packs.append([])
            room.append(tokens)
            k = len(packs) - 1
        packs[k].append(i)
        room[k] -= lengths[i]
    even: list[list[int]] = [[] for _ in packs]
    emptiest = [(0, k) for k in range(len(packs))]
    for i in longest_first:
        used, k = heapq.heappop(emptiest)
        even[k].append(i)
        if used + lengths[i] > tokens:
            return packs
        if len(even[k]) < sequences:
            heapq.heappush(emptiest, (used + lengths[i], k))
    return even


def check_fits(what: str, length: int, limits: PackLimits) -> None:
    """Refuses a sequence that is longer than a pack."""
    if limits.tokens is not None and length > limits.tokens:
        raise ValueError(
            f"{what} has {length} tokens, more than the {limits.tokens} of a micro-batch: raise "
            "training.tokens_per_micro_batch, or shorten it (text.max_passage_tokens, text.long_passages=truncate)"
        )


def _content(passage: Passage) -> tuple[str, str]:
    return passage.title, passage.text


def _content_id(tokens: Sequence[int]) -> int:
    """63 bits of a hash: two of a million passages share one with a probability of 1e-7."""
    digest = hashlib.blake2b(array("q", tokens).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _int64(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _moved(record: R, device: torch.device) -> R:
    """A dataclass of tensors, with every tensor on `device`."""

    def move(x: object) -> object:
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=True)
        if isinstance(x, Pack | GenPack):
            return x.to(device)
        return tuple(map(move, x)) if isinstance(x, tuple) else x

    return replace(record, **{f.name: move(getattr(record, f.name)) for f in fields(record)})
