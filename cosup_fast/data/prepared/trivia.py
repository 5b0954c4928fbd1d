"""Trivia questions that may be trained on, each with the lead that answers it.

The table says which question belongs to which lead, by the rule of `scripts/matching.py`; the text is read from the
packages.
"""

from __future__ import annotations

import csv
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml

from cosup_fast.data.prepared.questions import Question, short_answer
from cosup_fast.data.prepared.splits import page_roles
from cosup_fast.data.prepared.training import write_training
from cosup_fast.data.records import Example, Segment, read_passages

TABLE = Path(__file__).with_name("trivia.tsv")
_RED = "Red-Trivia-1.1.1/redbot/ext/trivia/lists/"
_CHATTERBOT = "chatterbot_corpus/data/english/trivia.yml"


def read_trivia(red: Path, chatterbot: Path) -> Iterator[Question]:
    """Every question of the two packages that is words alone, without a picture's address."""
    with tarfile.open(red) as archive:
        members = sorted(member.name for member in archive if member.name.startswith(_RED) and member.isfile())
        for name in members:
            topic = name.removeprefix(_RED).removesuffix(".yaml")
            file = archive.extractfile(name)
            assert file, name
            entries = yaml.safe_load(file.read())
            for number, (question, answers) in enumerate(entries.items()):
                if isinstance(answers, list) and "http" not in str(question):
                    yield _question(f"red-{topic}-{number}", str(question), map(str, answers))
    with zipfile.ZipFile(chatterbot) as archive:
        entries = yaml.safe_load(archive.read(_CHATTERBOT))["conversations"]
        for number, (question, *answers) in enumerate(entries):
            yield _question(f"chatterbot-{number}", question, answers)


def read_trivia_table(path: Path = TABLE) -> dict[str, str]:
    """The lead of every question that has one and may be trained on or tuned with."""
    with open(path, encoding="utf-8", newline="") as file:
        return dict(list(csv.reader(file, delimiter="\t"))[1:])


def write_trivia_table(pages: Mapping[str, str], path: Path = TABLE) -> None:
    """Writes which lead each question goes with, sorted."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("source", "page"))
        writer.writerows(sorted(pages.items()))


def build_trivia(packages: list[Path], home: Path, out: Path) -> None:
    """Writes the questions of the table, a file a split."""
    leads = {lead.id: lead for lead in read_passages(home / "wiki-leads" / "passages.jsonl")}
    roles, pages = page_roles(leads.values()), read_trivia_table()
    made: dict[str, list[Example]] = {"train": [], "dev": []}
    for question in read_trivia(*packages):
        if page := pages.get(question.source):
            answer = short_answer(question, leads[page])
            assert answer, question
            made[roles[page]].append(
                Example(
                    id=f"trivia-{question.source}",
                    dataset="trivia",
                    question=question.text,
                    output=[Segment(text=answer, passage=page)],
                    answers=list(dict.fromkeys(question.answers)),
                )
            )
    write_training(made, list(leads.values()), home, out)


def _question(source: str, text: str, answers: Iterable[str]) -> Question:
    bare = [re.sub(r"^(?:an?|the) |\.$", "", answer.strip(), flags=re.IGNORECASE) for answer in answers]
    return Question("trivia", source, " ".join(text.split()), [answer for answer in bare if answer], "string", None)
