"""Teacher-forced retrieval: what each [NSP] of an example asks for, and how many passages stand ahead of it.

    a query's gold passages = {the one it asks for} + {Example.gold} - {those that other [NSP] of the example ask for}

An example whose output retrieves nothing asks once, where its output begins, for any of its gold passages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.index import NonparametricIndex, embed_passages, embed_queries
from cosup_fast.model import CoSupervisionModel


def asked(example: Example) -> list[tuple[tuple[Segment, ...], set[str]]]:
    """For each [NSP] of an example, the segments before it and the ids of its gold passages."""
    cited = [segment.passage for segment in example.output if segment.passage is not None]
    if not cited:
        return [((), set(example.gold))] if example.gold else []
    return [
        (tuple(example.output[:i]), {segment.passage, *example.gold} - (set(cited) - {segment.passage}))
        for i, segment in enumerate(example.output)
        if segment.passage is not None
    ]


def retrieval_ranks(
    model: CoSupervisionModel,
    examples: Sequence[Example],
    index: NonparametricIndex | Sequence[Passage],
    *,
    embeddings: Tensor | None = None,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[int]:
    """Ranks of gold passages, example by example: for each teacher-forced [NSP], how many passages are ahead.

    The best of a query's gold passages counts. Ties count against it: a model that embeds all passages alike has the
    last rank.

    Args:
        model: Gen and Embseq.
        examples: an example that retrieves nothing and names no gold passage has no ranks.
        index: what to search, or the passages to embed first (which needs no faiss).
        embeddings: of the passages, (M, D), if they are made already.
        batch_tokens: most tokens in one pack.
        progress: show progress bars on stderr.

    Raises:
        ValueError: a passage that an example asks for is not in the corpus, or an example is too long.
    """
    if isinstance(index, NonparametricIndex):
        passages, embeddings = index.passages, index.embeddings
    else:
        passages = index
        if embeddings is None:
            embeddings = embed_passages(model, index, batch_tokens=batch_tokens, progress=progress)
    row_of = {passage.id: row for row, passage in enumerate(passages)}
    corpus = {passage.id: passage for passage in passages}
    queries, origins = embed_queries(model, examples, corpus, batch_tokens=batch_tokens, progress=progress)
    gold = [ids for example in examples for _, ids in asked(example)]
    assert len(gold) == len(queries)
    ranks: list[int] = []
    chunk = max(1, (1 << 26) // max(1, len(passages)))  # a quarter of a GB of scores
    for start in range(0, len(gold), chunk):
        with torch.autocast(embeddings.device.type, enabled=False):  # scores rounded to bf16 tie by the dozen
            scores = queries[start : start + chunk] @ embeddings.T
        for row, ids, (number, _) in zip(
            scores, gold[start : start + chunk], origins[start : start + chunk], strict=True
        ):
            rows = [row_of[name] for name in ids if name in row_of]
            if not rows:
                raise ValueError(
                    f"example {examples[number].id!r}: none of its gold passages {sorted(ids)} is in the corpus"
                )
            best = row[rows].max()
            ranks.append(int((row >= best).sum() - (row[rows] >= best).sum()))
    return ranks
