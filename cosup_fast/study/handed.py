"""Whether Gen follows the passage that it is handed, or its memory: gold passages that were replaced or altered.

    swapped    the gold passage of another question of the set
    replaced   the gold passage, its answer replaced by that of another question: a number by a number, a name by a name

A question is asked where its answer is a text that is in what Gen reads of the passage. `follows_memory`: a gold
answer is in what Gen wrote. `follows_passage`: under `replaced`, the new answer does; under `swapped`, the first
grounded text is in the other passage. The set `nq-substituted` comes with its answers replaced by entities of the
same type (Longpre et al. 2021, arXiv 2109.05052): `replaced` hands over its passages as they are, and memory is the
answer of `nq-restored`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosup_fast.data.answers import answer_spans, holds_answer
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sources import load_examples
from cosup_fast.data.template import Template
from cosup_fast.evaluation import Corpus, GoldRetriever, QuestionRecord, System, TestSet, Workbench, evaluate
from cosup_fast.evaluation.metrics import normalize
from cosup_fast.evaluation.scoring import has_label
from cosup_fast.generation import GenerationConfig

SWAPPED, REPLACED = "swapped", "replaced"
HANDED = (SWAPPED, REPLACED)
SUBSTITUTED = {"nq-substituted": "nq-restored/whole"}
"""Sets whose passages were altered, and where the original answers to the same ids are."""


@dataclass(frozen=True)
class Handed:
    """A question with the passage that Gen is handed."""

    original: Example  # with the answers of memory
    asked: Example  # its answers are those of the passage handed over
    passage: Passage


def followed(
    name: str,
    bench: Workbench,
    tests: Sequence[TestSet],
    corpora: Mapping[str, Corpus],
    config: GenerationConfig,
    *,
    folder: Path | None = None,
    batch: int = 16,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, dict[str, float]]]:
    """By test set, `follows_passage` and `follows_memory` of every question asked, by its key.

    Args:
        name: `swapped` or `replaced`.
        bench: whose model writes.
        tests: the sets; those without a text to follow are left out.
        corpora: by name, what the sets name.
        config: how to write.
        folder: where finished answers are kept.
        batch: questions answered at once.
        progress: called with the stages of the evaluation.
    """
    template = bench.model.template
    handed = {test.source: list(_HAND[name](test, corpora[test.corpus], template)) for test in tests}
    asked = [one for rows in handed.values() for one in rows]
    if not asked:
        return {}
    passages = Corpus([one.passage for one in asked], name)
    report = evaluate(
        System("gold", bench.model, GoldRetriever(passages), fingerprint=bench.fingerprint),
        [TestSet(source, [one.asked for one in rows]) for source, rows in handed.items()],
        config,
        judge=None,
        folder=folder,
        batch=batch,
        progress=progress,
    )
    records = iter(report.questions)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for source, rows in handed.items():
        scored = [(one, next(records)) for one in rows]
        if scored:
            found[source] = {
                "follows_passage": {r.key: float(_follows_passage(name, one, r)) for one, r in scored},
                "follows_memory": {r.key: float(holds_answer(r.answer.text, one.original)) for one, r in scored},
            }
    return found


def _follows_passage(name: str, one: Handed, record: QuestionRecord) -> bool:
    if name == REPLACED:
        return holds_answer(record.answer.text, one.asked)
    first = next((s.text for s in record.answer.segments if s.passage is not None and s.text.strip()), "")
    read = f" {normalize(f'{one.passage.title} {one.passage.text}')} "
    return bool(normalize(first)) and f" {normalize(first)} " in read


def swapped(test: TestSet, corpus: Corpus, template: Template) -> Iterator[Handed]:
    """Each question with the gold passage of the one after it, which holds none of its answers."""
    rows = [(e, corpus.by_id[corpus.found(e.gold)[0]]) for e in readable(test, corpus, template)]
    for place, (example, _) in enumerate(rows):
        others = (passage for _, passage in (*rows[place + 1 :], *rows[:place]))
        other = next((p for p in others if not holds_answer(f"{p.title} {p.text}", example)), None)
        if other is not None:
            yield _handed(example, example, other)


def replaced(test: TestSet, corpus: Corpus, template: Template) -> Iterator[Handed]:
    """Each question with its gold passage, in which another answer stands wherever its own stood."""
    if test.source in SUBSTITUTED:
        memory = {e.id: e.answers for e in load_examples(SUBSTITUTED[test.source], None)}
        for example in readable(test, corpus, template):
            if example.id in memory:
                original = example.model_copy(update={"answers": memory[example.id]})
                yield _handed(original, example, corpus.by_id[corpus.found(example.gold)[0]])
        return
    rows = list(readable(test, corpus, template))
    answers = sorted({example.answers[0] for example in rows})
    for example in rows:
        passage = corpus.by_id[corpus.found(example.gold)[0]]
        new = _another(example, f"{passage.title} {passage.text}", answers)
        if new is None:
            continue
        altered = passage.model_copy(
            update={name: with_answer(getattr(passage, name), example, new) for name in ("title", "text")}
        )
        asked = example.model_copy(update={"answers": [new], "answer_sets": []})
        if holds_answer(_read(altered, template), asked):
            yield _handed(example, asked, altered)


_HAND: Mapping[str, Callable[[TestSet, Corpus, Template], Iterator[Handed]]] = {SWAPPED: swapped, REPLACED: replaced}


def readable(test: TestSet, corpus: Corpus, template: Template) -> Iterator[Example]:
    """The questions whose answer is a text that is in what Gen reads of the gold passage."""
    for example in test.examples:
        found = corpus.found(example.gold)
        if example.answer_type == "regex" or not example.answers or has_label(example) or not found:
            continue
        if holds_answer(_read(corpus.by_id[found[0]], template), example):
            yield example


def _handed(original: Example, asked: Example, passage: Passage) -> Handed:
    """A passage of the question's own, whatever others share it."""
    own = passage.model_copy(update={"id": f"handed:{original.dataset}:{original.id}"})
    return Handed(original, asked.model_copy(update={"gold": [own.id], "output": []}), own)


def _read(passage: Passage, template: Template) -> str:
    """What Gen reads of a passage, which may be cut."""
    return template.decode(template.inserted_passage(passage))


def with_answer(text: str, example: Example, new: str) -> str:
    """The text with another answer wherever one of the example's stands."""
    for start, end in reversed(answer_spans(text, example)):
        text = f"{text[:start]}{new}{text[end:]}"
    return text


def _another(example: Example, held: str, answers: Sequence[str]) -> str | None:
    """An answer of the same shape that is not right and is not in the passage, drawn by the question's id."""
    for answer in random.Random(example.id).sample(answers, len(answers)):
        as_answer = example.model_copy(update={"answers": [answer], "answer_sets": []})
        alike = _shape(answer) == _shape(example.answers[0])
        if alike and not holds_answer(answer, example) and not holds_answer(held, as_answer):
            return answer
    return None


def _shape(answer: str) -> tuple[bool, bool, bool]:
    """What kind of answer it is: with a digit, capitalised, a phrase of more than a few words."""
    return any(sign.isdigit() for sign in answer), answer[:1].isupper(), len(answer.split()) > 3
