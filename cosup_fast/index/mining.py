"""Hard negatives: passages that a model ranks high for a question though they do not answer it.

1. Every [NSP] of an example, teacher-forced, searches the index.
2. Of its `depth` best passages the first `skip_top` are left out, and so is what may well answer: the example's gold
   passages, by id or by text; a passage that contains one of its answers; one that scores too near the positive.
3. The rest, best first and in turn from the example's queries, become its `negatives`, after those it has already.

A passage contains an answer if the answer's words occur in a row in its title or text, as `data.answers` compares them.
It contains one that is a pattern if the pattern is found there, or takes too long to look for.

Sources: mining with the model that is trained, Xiong et al. 2021, arXiv 2007.00808 (ANCE); no passage that bears an
answer, Karpukhin et al. 2020, arXiv 2004.04906 (DPR), section 3.2; a largest share of the positive's score, Moreira et
al. 2024, arXiv 2407.15831 (NV-Retriever).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from rich.progress import track
from torch import Tensor

from cosup_fast.data.answers import answer_patterns, holds_answer
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.strict import Section
from cosup_fast.files import Journal
from cosup_fast.index import NonparametricIndex, Origin, embed_queries
from cosup_fast.model import CoSupervisionModel
from cosup_fast.terminal import SafeConsole

BLOCK = 256
"""Examples that are embedded, searched and recorded together."""


class MiningConfig(Section):
    """Which of the passages that a query finds become hard negatives."""

    depth: int = Field(default=100, ge=1, description="passages looked at for each query")
    per_example: int = Field(default=4, ge=1, description="negatives mined for each example, at most")
    skip_top: int = Field(default=0, ge=0, description="best passages of each query that are left out unseen")
    margin: float | None = Field(
        default=None, ge=0, description="a negative scores at least this much below the positive"
    )
    max_score: float | None = Field(
        default=None, ge=0, le=1, description="a negative scores at most this share of the positive's score"
    )

    @model_validator(mode="after")
    def _deep_enough(self) -> Self:
        if self.skip_top >= self.depth:
            raise ValueError(
                f"skip_top={self.skip_top} leaves nothing of the depth={self.depth} passages of a query: raise depth"
            )
        return self

    def ceiling(self, positive: Tensor) -> Tensor:
        """The largest score of a negative, given the positive's: min(s - margin, s - (1 - max_score) |s|)."""
        bound = torch.full_like(positive, torch.inf)
        if self.margin is not None:
            bound = bound.minimum(positive - self.margin)
        if self.max_score is not None:
            bound = bound.minimum(positive - (1 - self.max_score) * positive.abs())
        return bound


@dataclass(frozen=True)
class Mined:
    """The examples with their hard negatives, and what was passed over on the way."""

    examples: list[Example]
    found: int  # negatives mined
    short: int  # examples that got fewer than per_example
    passed_over: Counter[str]  # candidates by the reason: "gold", "answer", "score"


def mine(
    model: CoSupervisionModel,
    index: NonparametricIndex,
    examples: Sequence[Example],
    config: MiningConfig | None = None,
    *,
    journal: Path | None = None,
    progress: bool = True,
) -> Mined:
    """Mines hard negatives for every example.

    Args:
        model: whose queries search.
        index: what is searched; every passage that an example names is in it.
        examples: ids unique. One that retrieves nothing and names no gold passage gets no negatives.
        config: how to choose.
        journal: a file that keeps what is done; with it the same call resumes where an earlier one was interrupted. A
            journal of other weights, passages, examples or settings is started again.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an example id twice, a passage that the index lacks, an answer pattern that does not compile, or
            what `embed_queries` and `NonparametricIndex.search` refuse.
    """
    miner = _Miner(model, index, examples, config or MiningConfig())
    blocks = [examples[i : i + BLOCK] for i in range(0, len(examples), BLOCK)]
    bar = track(blocks, "Mining", console=SafeConsole(stderr=True), transient=True, disable=not progress)
    with Journal(journal, miner.stamp, restart=True) as kept:
        for block in bar:
            if block[-1].id not in kept.done:
                for name, found in miner.mine(block).items():
                    kept.add(name, found)
    mined = [(example, kept.done[example.id]) for example in examples]
    passed_over: Counter[str] = Counter()
    for _, one in mined:
        passed_over.update(one["passed_over"])
    return Mined(
        [e.model_copy(update={"negatives": [*e.negatives, *one["negatives"]]}) for e, one in mined],
        sum(len(one["negatives"]) for _, one in mined),
        sum(len(one["negatives"]) < miner.config.per_example for _, one in mined),
        passed_over,
    )


class _Miner:
    def __init__(
        self, model: CoSupervisionModel, index: NonparametricIndex, examples: Sequence[Example], config: MiningConfig
    ):
        self.model, self.index, self.config = model, index, config
        named = _check(examples)
        self.corpus: dict[str, Passage] = {}  # what the examples name: an index may be larger than memory
        rows: dict[str, int] = {}
        digest = hashlib.sha256()
        for record in (Origin.of(model), index.origin, config, *examples):
            digest.update(record.model_dump_json().encode() + b"\n")
        for row, passage in enumerate(index.passages):
            digest.update(f"{passage.id}\0{passage.title}\0{passage.text}\n".encode())
            if passage.id in named:
                self.corpus[passage.id], rows[passage.id] = passage, row
        if missing := [name for name in named if name not in rows]:
            raise ValueError(f"example {named[missing[0]]!r} names the passage {missing[0]!r}, which the index lacks")
        self.stamp = {"mining": digest.hexdigest()}
        self.positives: dict[str, Tensor] = {}
        if config.margin is not None or config.max_score is not None:
            self.positives = dict(zip(rows, torch.from_numpy(index.vectors(np.array(list(rows.values()))))))

    def mine(self, examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
        """For each example id its new negatives, and what was passed over and why."""
        found: dict[str, dict[str, Any]] = {e.id: {"negatives": [], "passed_over": {}} for e in examples}
        queries, asked = embed_queries(self.model, examples, self.corpus)
        if not asked:
            return found
        scores, rows = self.index.search(queries, self.config.depth)
        ceilings = torch.full((len(asked),), torch.inf)
        if self.positives:
            positives = torch.stack([self.positives[name] for _, name in asked])
            ceilings = self.config.ceiling((queries * positives).sum(1))
        lists: dict[int, list[Iterator[Passage]]] = {}
        reasons: dict[int, Counter[str]] = {}
        for (number, _), query_scores, query_rows, ceiling in zip(asked, scores, rows, ceilings.tolist()):
            ranked = zip(query_scores.tolist(), query_rows.tolist())
            reason = reasons.setdefault(number, Counter())
            candidates = self._candidates(examples[number], list(ranked), ceiling, reason)
            lists.setdefault(number, []).append(candidates)
        for number, candidates in lists.items():
            example = examples[number]
            chosen: dict[tuple[str, str], str] = {}
            for passage in filter(None, chain.from_iterable(zip_longest(*candidates))):
                chosen.setdefault(passage.content, passage.id)
                if len(chosen) == self.config.per_example:
                    break
            found[example.id] = {"negatives": list(chosen.values()), "passed_over": dict(reasons[number])}
        return found

    def _candidates(
        self, example: Example, ranked: list[tuple[float, int]], ceiling: float, passed_over: Counter[str]
    ) -> Iterator[Passage]:
        """The passages of one query that may be negatives, best first; reads no further than it is asked."""
        gold = {self.corpus[name].content for name in (*example.gold, *example.cited)}
        given = {self.corpus[name].content for name in example.negatives}
        for score, row in ranked[self.config.skip_top :]:
            if row < 0:  # the search found no more
                return
            passage = self.index.passages[row]
            if passage.content in gold:
                passed_over["gold"] += 1
            elif score > ceiling:
                passed_over["score"] += 1
            elif bears_answer(passage, example):
                passed_over["answer"] += 1
            elif passage.content not in given:
                yield passage


def bears_answer(passage: Passage, example: Example) -> bool:
    """Whether one of an example's answers is in a passage's title or text; a pattern that takes too long does."""
    return holds_answer(f"{passage.title}\n{passage.text}", example, undecided=True)


def _check(examples: Iterable[Example]) -> dict[str, str]:
    """The passages that examples name, each with the id of one that does."""
    seen: set[str] = set()
    named: dict[str, str] = {}
    for example in examples:
        if example.id in seen:
            raise ValueError(f"example id {example.id!r} occurs more than once: ids must be unique")
        seen.add(example.id)
        named |= dict.fromkeys((*example.gold, *example.cited, *example.negatives), example.id)
        answer_patterns(example)  # which refuses what does not compile
    return named
