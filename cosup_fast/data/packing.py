"""Examples to packs: sequences laid end to end, with where each one ends, and who asks for which passage.

A batch is what one step contrasts, or one rank's part of that. It is cut into packs, the micro-batches of Gen and,
apart from them, of Embseq: one pack each, or as many as keep within `PackLimits`. How it is cut changes no loss and no
gradient.

Shapes: T tokens of a pack, S sequences in it, N queries ([NSP] tokens) and M distinct passages of the batch.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import IGNORE, GenSequence, Template, TooLongError

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

    A filler is more sequences after the `count` real ones: attention keeps them apart and nothing reads them.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, restarts at 0 with every sequence
    cu_seqlens: Tensor  # (S + 1,) int32, cumulative lengths from 0 to T, filler included
    lengths: tuple[int, ...]  # S lengths, on the host so that nothing waits for a device
    count: int  # sequences that are not filler, the first ones

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

    @classmethod
    def nothing(cls, size: int | None, longest: int) -> Self:
        """A pack of filler alone: one token, or `size` tokens in pieces no longer than `longest`."""
        return replace(cls.of([[0] * (1 if size is None else min(size, longest))], size), count=0)

    @property
    def last_rows(self) -> Tensor:
        """The row of each sequence's last token: (count,) int64."""
        return self.cu_seqlens[1 : self.count + 1].long() - 1

    @property
    def tokens(self) -> int:
        """Tokens that are not filler."""
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

    @classmethod
    def of_nothing(cls, pack: Pack) -> Self:
        """A pack of filler, from which nothing is learnt."""
        return cls(pack, *map(_int64, ([], [], [])))

    def to(self, device: torch.device) -> Self:
        """The pack with its tensors on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class StepCounts:
    """What a whole step holds, over all ranks."""

    ntp: int  # supervised tokens
    nsp: int  # queries
    passages: int
    tokens: int  # of both models


@dataclass(frozen=True)
class CoSupervisionBatch:
    """What one training step reads, or a rank's part of it. Passages with the same tokens are one, encoded once.

    Queries count over the packs of Gen in order, passages over those of Embseq: those that the queries ask for, and the
    hard negatives of the examples. The passage that answers a query may be one of another rank.
    """

    gen: tuple[GenPack, ...]  # none where there are more ranks than examples
    passages: tuple[Pack, ...]  # for Embseq; none when no example has a retrieval
    positive: Tensor  # (N,) int64, the row that answers each query among the passages of all ranks, in rank order
    key_ids: Tensor  # (M,) int64, an id of each passage made from its tokens: the same in every process
    positive_ids: Tensor | None  # (N, P) int64, ids of the further positives of each query, then -1
    step: StepCounts

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
        """Tokens of both models that are not filler."""
        return sum(pack.tokens for pack in self.packs)

    def to(self, device: torch.device) -> Self:
        """The batch with its tensors on `device`."""
        return _moved(self, device)


def make_batch(
    examples: Sequence[Example],
    corpus: Mapping[str, Passage],
    template: Template,
    limits: PackLimits | None = None,
    *,
    rank: int = 0,
    ranks: int = 1,
    even: bool = False,
    retrieval: bool = True,
) -> CoSupervisionBatch:
    """Tokenizes and packs examples with the passages they ask for and with their hard negatives.

    Every passage is a candidate of every query: one example's hard negative is every query's. A passage known
    to answer a query is never its negative: the positives of a query are the passage that its [NSP] asks for and those
    of `Example.gold` in the batch that no other [NSP] of the example asks for.

    Ranks share the examples so that each has nearly as many tokens, and the passages so that each is encoded once, by
    one of the ranks whose examples name it. All of them tokenize everything, and so know of one another without a word.

    Args:
        examples: those of the whole step.
        corpus: passages by id.
        template: the text template.
        limits: of the packs.
        rank: whose part this is.
        ranks: how many there are.
        even: give every rank as many packs as any, if with packs that hold nothing.
        retrieval: false for a Gen without an Embseq: it reads the passages that are inserted, and nobody is asked.

    Raises:
        ValueError: no example, what `Template.gen_sequence` and `Template.sequence` refuse, or a sequence that is
            longer than a pack.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    limits = limits or PackLimits()
    size = limits.tokens if limits.fixed else None
    sequences = [template.gen_sequence(example, corpus) for example in examples]
    if not retrieval:
        sequences = [replace(sequence, query_rows=[], query_passages=[]) for sequence in sequences]
    for example, s in zip(examples, sequences, strict=True):
        check_fits(f"example {example.id!r}", len(s.input_ids), limits)
    gen_lengths = [len(s.input_ids) for s in sequences]
    gen_plans = [_plan(share, gen_lengths, limits) for share in share_out(gen_lengths, ranks)]
    orders = [[member for pack in plan for member in pack] for plan in gen_plans]
    named = [(r, corpus[name]) for r, order in enumerate(orders) for i in order for name in sequences[i].query_passages]
    if named:
        named += [(r, corpus[name]) for r, order in enumerate(orders) for i in order for name in examples[i].negatives]
    of_tokens: dict[tuple[int, ...], int] = {}
    of_content: dict[tuple[str, str], int] = {}  # two ids may stand for the same text
    askers: list[set[int]] = []
    for asker, passage in named:
        if passage.content not in of_content:
            tokens = tuple(template.sequence(passage))
            check_fits(f"passage {passage.id!r}", len(tokens), limits)
            of_content[passage.content] = of_tokens.setdefault(tokens, len(of_tokens))
            askers += [set() for _ in range(len(of_tokens) - len(askers))]
        askers[of_content[passage.content]].add(asker)
    distinct = list(of_tokens)
    lengths = [len(tokens) for tokens in distinct]
    plans = [_plan(share, lengths, limits) for share in share_out(lengths, ranks, askers)]
    row_of = {member: row for row, member in enumerate(member for plan in plans for pack in plan for member in pack)}

    def further(member: int) -> list[int]:
        """Rows of the passages that answer an example without being asked for."""
        gold = {of_content.get(corpus[name].content) for name in examples[member].gold if name in corpus}
        asked = {of_content[corpus[name].content] for name in sequences[member].query_passages}
        return sorted(row_of[found] for found in gold - asked if found is not None)

    rows = [[further(member) for member in order] for order in orders]
    most = max((len(found) for of_rank in rows for found in of_rank), default=0)
    member_at = list(row_of)
    ids = [
        [content_id(distinct[member_at[row]]) for row in found] + [-1] * (most - len(found))
        for member, found in zip(orders[rank], rows[rank], strict=True)
        for _ in sequences[member].query_passages
    ]
    own = [passage for asker, passage in named[: sum(len(s.query_passages) for s in sequences)] if asker == rank]
    gen = [GenPack.of([sequences[member] for member in pack], size) for pack in gen_plans[rank]]
    passages = [Pack.of([distinct[member] for member in pack], size) for pack in plans[rank]]
    if even:
        nothing = Pack.nothing(size, max(gen_lengths))
        gen += [GenPack.of_nothing(nothing)] * (max(map(len, gen_plans)) - len(gen))
        passages += [nothing] * (max(map(len, plans)) - len(passages))
    return CoSupervisionBatch(
        gen=tuple(gen),
        passages=tuple(passages),
        positive=_int64([row_of[of_content[passage.content]] for passage in own]),
        key_ids=_int64([content_id(distinct[member]) for pack in plans[rank] for member in pack]),
        positive_ids=_int64(ids).view(len(ids), most) if most else None,
        step=StepCounts(
            sum(label != IGNORE for s in sequences for label in s.labels),
            sum(len(s.query_passages) for s in sequences),
            len(distinct),
            sum(gen_lengths) + sum(lengths),
        ),
    )


def share_out(lengths: Sequence[int], ranks: int, allowed: Sequence[set[int]] | None = None) -> list[list[int]]:
    """The members of each rank: the longest goes first, each to the rank with the fewest tokens of those allowed."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks) if allowed is None else allowed[i], key=lambda rank: (tokens[rank], rank))
        shares[rank].append(i)
        tokens[rank] += lengths[i]
    return [sorted(share) for share in shares]


def _plan(members: Sequence[int], lengths: Sequence[int], limits: PackLimits) -> list[list[int]]:
    """`plan_packs` of some of the sequences."""
    return [[members[i] for i in pack] for pack in plan_packs([lengths[i] for i in members], limits)]


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
        raise TooLongError(
            f"{what} has {length} tokens, more than the {limits.tokens} of a micro-batch: raise "
            "training.tokens_per_micro_batch, or shorten it (text.max_passage_tokens, text.long_passages=truncate)"
        )


def content_id(tokens: Sequence[int]) -> int:
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
