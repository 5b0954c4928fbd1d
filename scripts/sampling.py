"""How the study's sample was drawn: which questions of each test set, and which passages they are searched among.

    python scripts/sampling.py --check     compares the committed table with one drawn again
    python scripts/sampling.py --write     writes it (it is drawn once: every result depends on it)

At most 200 questions of a set, in turn of its groups (labels, relations), in the order of a hash of their ids. A
question may be drawn when
1. no question that trains or tunes has its words, and no other of its set;
2. its passage, unless that is a lead, shares no ten words in a row with a lead that trains or tunes;
3. it has an answer of more than a letter among the first 100 words of its passage, which may then be cut to 192
   tokens; a claim is true or false, and half of its words, the title's left out, stand there.
Natural Questions with and without substituted answers ask the same questions. A corpus of more than 2,100 passages is
cut to 2,000: those that answer, and others in the order of a hash.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from cosup_fast.data import sources
from cosup_fast.data.prepared.benchmarks import BENCHMARKS, LEADS, TABLE, Asked, read_table, write_table
from cosup_fast.data.prepared.prepare import prepare
from cosup_fast.data.prepared.spans import draw
from cosup_fast.data.prepared.splits import page_roles
from cosup_fast.data.prepared.words import STOPWORDS, find_answer, stem, tokens
from cosup_fast.data.records import Example, Passage, read_examples, read_passages
from cosup_fast.evaluation.metrics import LABELS

QUESTIONS, PASSAGES, WORDS, RUN = 200, 2000, 100, 10
TRAINED = ("cloze", "questions", "spans", "chains", "claims", "trivia")
NEEDED = ("wiki-leads", *TRAINED, "bigbench", "fever-pages")
RESTORED, SUBSTITUTED = "nq-restored", "nq-substituted"


def draw_sample(home: Path) -> dict[tuple[str, str], list[str]]:
    """The ids of the table: of questions and, where they are not all, of passages."""
    leads = read_passages(home / "wiki-leads" / "passages.jsonl")
    roles = page_roles(leads)
    trained = {run for lead in leads if roles[lead.id] != "test" for run in _runs(lead.text)}
    files = [home / name / f"{split}.jsonl" for name in TRAINED for split in ("train", "dev")]
    asked = {tuple(tokens(example.question)) for file in files for example in read_examples(file, None)}
    ids: dict[tuple[str, str], list[str]] = {}
    gold: set[str] = set()
    restored_gold: set[str] = set()
    twins = {item[1].id: item for item in BENCHMARKS[SUBSTITUTED].read(home)}
    for name, benchmark in BENCHMARKS.items():
        read = list(benchmark.read(home))
        if name == SUBSTITUTED:
            chosen = [_twin(id) for id in ids[RESTORED, "question"]]
        else:
            fit = list(_fit(read, asked, trained if benchmark.own_corpus else ()))
            if name == RESTORED:
                fit = [item for item in fit if _answers(*twins[_twin(item[1].id)][1:])]
            chosen = _in_turn(fit)
        ids[name, "question"] = sorted(chosen)
        answering = {page for _, example, _ in read if example.id in set(chosen) for page in example.gold}
        passages = list(dict.fromkeys(passage.id for _, _, passage in read))
        if not benchmark.own_corpus:
            gold |= answering
        elif name == SUBSTITUTED:
            others = set(ids[RESTORED, "passage"]) - restored_gold
            ids[name, "passage"] = sorted(answering | {_twin(passage) for passage in others})
        elif len(passages) > 1.05 * PASSAGES:
            ids[name, "passage"] = _corpus(passages, answering)
        if name == RESTORED:
            restored_gold = answering
    ids[LEADS, "passage"] = _corpus([lead.id for lead in leads], gold)
    return ids


def _fit(read: Iterable[Asked], asked: Collection[tuple[str, ...]], trained: Collection[int]) -> Iterator[Asked]:
    """The questions that may be drawn."""
    seen: set[tuple[str, ...]] = set()
    leaks: dict[str, bool] = {}
    for item in read:
        _, example, passage = item
        key = tuple(tokens(example.question))
        if key in asked or key in seen or not _answers(example, passage):
            continue
        if passage.id not in leaks:
            leaks[passage.id] = any(run in trained for run in _runs(passage.text))
        if not leaks[passage.id]:
            seen.add(key)
            yield item


def _answers(example: Example, passage: Passage) -> bool:
    """Whether the beginning of the passage says what is asked, or decides a claim, as far as words can tell."""
    start = " ".join(passage.text.split()[:WORDS])
    if example.instruction:
        named = {*STOPWORDS, *tokens(passage.title)}
        said = [stem(word) for word in dict.fromkeys(tokens(example.question)) if word not in named]
        there = {stem(word) for word in tokens(start)}
        return example.answers != ["NOT ENOUGH INFO"] and 2 * sum(word in there for word in said) >= len(said)
    answers = [answer for answer in example.answers if len(answer) > 1]
    return any(find_answer(text, answers, example.answer_type) for text in (passage.title, start))


def _in_turn(fit: Iterable[Asked]) -> list[str]:
    """The first ids of each group in turn, until there are enough; of labels, as many of each."""
    groups: dict[str, list[str]] = defaultdict(list)
    for group, example, _ in fit:
        groups[group].append(example.id)
    columns = [sorted(groups[group], key=draw) for group in sorted(groups)]
    rows = zip(*columns, strict=False) if LABELS.keys() >= groups.keys() else zip_longest(*columns)
    return [id for row in rows for id in row if id is not None][:QUESTIONS]


def _corpus(passages: Collection[str], answering: set[str]) -> list[str]:
    others = sorted((id for id in passages if id not in answering), key=draw)
    return sorted([*answering, *others[: PASSAGES - len(answering)]])


def _twin(id: str) -> str:
    return id.replace(RESTORED, SUBSTITUTED)


def _runs(text: str) -> set[int]:
    words = tokens(text)
    return {hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def main() -> None:
    """Checks or writes the table."""
    parser = argparse.ArgumentParser(prog="python scripts/sampling.py", description="Checks or writes the sample.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare the committed table with one drawn again")
    action.add_argument("--write", action="store_true", help="write the table")
    arguments = parser.parse_args()
    for name in NEEDED:
        prepare(name)
    table = draw_sample(sources.home())
    if arguments.write:
        write_table(table)
    elif changed := [key for key in table.keys() | read_table().keys() if table.get(key) != read_table().get(key)]:
        sys.exit(f"{TABLE.name} differs in {sorted(changed)}")
    print(f"{TABLE.name}: " + ", ".join(f"{name} {len(ids)} {kind}s" for (name, kind), ids in table.items()))


if __name__ == "__main__":
    main()
