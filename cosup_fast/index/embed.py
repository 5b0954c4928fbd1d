"""Sequence embeddings of passages and queries of teacher-forced examples, in packs without pad tokens.

Shapes: N queries, M passages, D Gen's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from rich.progress import track
from torch import Tensor

from cosup_fast.data.packing import Pack
from cosup_fast.data.records import Example, Passage
from cosup_fast.terminal import SafeConsole

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

Precision = Literal["float32", "bfloat16"]

# Sequence embeddings stay on the model's device for so many packs, so that a GPU never waits for a copy.
_PACKS_BETWEEN_COPIES = 16


def embed_passages(
    model: CoSupervisionModel,
    passages: Sequence[Passage],
    *,
    batch_tokens: int | None = None,
    precision: Precision | None = None,
    progress: bool = False,
) -> Tensor:
    """Sequence embeddings of passages, (M, D) fp32 on the CPU; each depends on its own passage alone.

    Args:
        model: runs in evaluation mode without gradients, and has its modes back afterwards.
        passages: the passages, in the order of the rows.
        batch_tokens: most tokens in one pack, a longer passage being a pack of its own; by default 4,096 on a CPU and
            16,384 on a GPU.
        precision: of the products; None leaves them as they are around the call.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: `batch_tokens` below 1, or a passage that is too long for `Template.sequence`.
    """
    sequences = model.template.sequences(passages)
    lengths = [len(sequence) for sequence in sequences]
    return embed_sequences(
        model, lengths, sequences.__getitem__, batch_tokens=batch_tokens, precision=precision, progress=progress
    )


def embed_sequences(
    model: CoSupervisionModel,
    lengths: Sequence[int],
    tokens: Callable[[int], list[int]],
    *,
    batch_tokens: int | None = None,
    precision: Precision | None = None,
    on_pack: Callable[[int], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Sequence embeddings of tokenized passages, (M, D) fp32 on the CPU.

    Args:
        model: as for `embed_passages`.
        lengths: tokens of each passage.
        tokens: the tokens of the passage in a row, as `Template.sequence` makes them.
        batch_tokens: as for `embed_passages`.
        precision: as for `embed_passages`.
        on_pack: called after each pack with the number of its passages.
        progress: show a progress bar on stderr.
    """
    embeddings = torch.empty(len(lengths), model.width)
    waiting: list[tuple[list[int], Tensor]] = []

    def collect() -> None:
        if waiting:
            rows = [row for rows, _ in waiting for row in rows]
            embeddings[rows] = torch.cat([found for _, found in waiting]).cpu()
            waiting.clear()

    with evaluation_mode(model), _products(model.device, precision):
        for rows in _packs(lengths, _budget(batch_tokens, model.device), "Embedding passages", progress):
            pack = Pack.of([tokens(row) for row in rows]).to(model.device)
            waiting.append((rows, model.embed(pack).float()))
            if len(waiting) == _PACKS_BETWEEN_COPIES:
                collect()
            if on_pack is not None:
                on_pack(len(rows))
        collect()
    return embeddings


def embed_queries(
    model: CoSupervisionModel,
    examples: Sequence[Example],
    corpus: Mapping[str, Passage],
    *,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, list[tuple[int, str]]]:
    """Queries of teacher-forced examples: Gen's hidden state at every [NSP], (N, D) fp32 on the CPU.

    An example whose output retrieves nothing but that names gold passages asks once, where its output begins.

    Returns:
        The queries, and for each of them (row of its example, id of the passage it asks for).

    Raises:
        ValueError: `batch_tokens` below 1, or what `Template.gen_sequence` refuses.
    """
    template = model.template
    sequences: list[list[int]] = []
    asked: list[tuple[int, str]] = []
    for number, example in enumerate(examples):
        sequence = template.gen_sequence(example, corpus)
        ids, rows, wanted = sequence.input_ids, sequence.query_rows, sequence.query_passages
        if not rows and example.gold:
            ids = [*template.prompt(example.question, example.instruction), template.nsp]
            rows, wanted = [len(ids) - 1], example.gold[:1]
        if rows:
            sequences.append(ids[: rows[-1] + 1])
            asked.extend((number, passage) for passage in wanted)
    return _queries(model, sequences, batch_tokens, progress), asked


def embed_asking(model: CoSupervisionModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The query at the end of each of Gen's token sequences, which end in [NSP]: (N, D) fp32 on the CPU."""
    ends = list(accumulate(sequence.count(model.template.nsp) for sequence in sequences))
    return _queries(model, sequences, None, False)[[end - 1 for end in ends]]


def _queries(
    model: CoSupervisionModel, sequences: Sequence[Sequence[int]], batch_tokens: int | None, progress: bool
) -> Tensor:
    """The query at every [NSP] of Gen's token sequences, one after the other: (N, D) fp32 on the CPU."""
    nsp = model.template.nsp
    starts = list(accumulate((sequence.count(nsp) for sequence in sequences), initial=0))
    queries = torch.empty(starts[-1], model.width)
    lengths = [len(sequence) for sequence in sequences]
    with evaluation_mode(model):
        for members in _packs(lengths, _budget(batch_tokens, model.device), "Embedding queries", progress):
            pack = Pack.of([sequences[member] for member in members]).to(model.device)
            rows = (pack.input_ids == nsp).nonzero()[:, 0]
            asking = [row for member in members for row in range(starts[member], starts[member + 1])]
            queries[asking] = model.query_embeddings(pack, rows).float().cpu()
    return queries


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module has its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _products(device: torch.device, precision: Precision | None):
    if precision is None:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _budget(batch_tokens: int | None, device: torch.device) -> int:
    if batch_tokens is None:
        return 4096 if device.type == "cpu" else 16384
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens}: a pack needs at least one token")
    return batch_tokens


def _packs(lengths: Sequence[int], batch_tokens: int, title: str, progress: bool) -> Iterator[list[int]]:
    """Rows in packs of at most `batch_tokens` tokens, longest first, so that memory runs out at once."""
    packs: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not packs or lengths[row] > room:
            packs.append([])
            room = batch_tokens
        packs[-1].append(row)
        room -= lengths[row]
    yield from track(packs, title, console=SafeConsole(stderr=True), transient=True, disable=not progress)
