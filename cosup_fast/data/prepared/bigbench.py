"""Test sets that the archive of BIG-bench holds: each of its files to questions and the passages that answer them.

Its files ask to appear in no training corpus, so nothing here is ever trained on. A reader yields everything that its
file has, in its order; `scripts/sampling.py` drew the sample.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cosup_fast.data.prepared.questions import VERIFY, decode_fever_title, page_id
from cosup_fast.data.prepared.words import find_answer
from cosup_fast.data.records import Example, Passage, Segment

Pair = tuple[Example, Passage]

_ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks/"
MEMBERS = {  # name in the prepared folder -> member of the archive
    "squad.json": "squad_shifts/squaddev_v1.1.json",
    "new-wiki.json": "squad_shifts/new_wiki_v1.0.json",
    "nyt.json": "squad_shifts/nyt_v1.0.json",
    "reddit.json": "squad_shifts/reddit_v1.0.json",
    "nq-substituted.json": "contextual_parametric_knowledge_conflicts/task.json",
    "quoref.json": "natural_instructions/subtask002_quoref_answer_generation/task.json",
    "vitaminc.json": "vitaminc_fact_verification/task.json",
    "fever.json": "fact_checker/fever/task.json",
    "wikidata.json": "qa_wikidata/task.json",
}
_LABELS = {"true": "SUPPORTS", "false": "REFUTES", "neither": "NOT ENOUGH INFO"}


def build_bigbench(packages: list[Path], home: Path, out: Path) -> None:
    """Extracts the members that are read, and nothing else; nothing of the archive is run."""
    wanted = {_ROOT + member: name for name, member in MEMBERS.items()}
    with tarfile.open(packages[0]) as archive:
        for member in archive:
            if name := wanted.pop(member.name, None):
                source = archive.extractfile(member)
                assert source, member.name
                (out / name).write_bytes(source.read())
    assert not wanted, f"the archive lacks {sorted(wanted)}"


def read_squad(file: Path, titled: bool) -> Iterator[Pair]:
    """SQuAD's format, which SquadShifts has too: articles of paragraphs, each with questions."""
    name = file.stem
    for article_number, article in enumerate(_load(file)["data"]):
        title = unquote(article["title"]).replace("_", " ") if titled else ""
        for number, paragraph in enumerate(article["paragraphs"]):
            passage = _passage(f"{name}:{article_number}-{number}", title, paragraph["context"])
            for asked in paragraph["qas"]:
                answers = list(dict.fromkeys(answer["text"].strip() for answer in asked["answers"]))
                yield _example(name, asked["id"], asked["question"], answers, passage), passage


def read_nq(file: Path, restored: bool) -> Iterator[Pair]:
    """Natural Questions with the answer in each passage replaced by another entity, or put back.

    Left out are passages with the entity twice in a few words: there two answers had become one.
    """
    name = "nq-restored" if restored else "nq-substituted"
    texts: dict[str, str] = {}
    for number, task in enumerate(_load(file)["examples"]):
        question, text = _match(r"\nQuestion: (.*?)\nContext: (.*)", task["input"])
        (original,) = (answer for answer, score in task["target_scores"].items() if not score)
        entity = re.escape(task["target"])
        if re.search(rf"{entity}.{{,10}}{entity}", text):
            continue
        answer = original if restored else task["target"]
        if restored:
            text = text.replace(task["target"], original)
        passage = _passage(texts.setdefault(text, f"{name}:{number}"), "", text)
        yield _example(name, str(number), question, [answer], passage), passage


def read_quoref(file: Path) -> Iterator[Pair]:
    """Quoref's questions with a single answer; a passage is asked about many times."""
    texts: dict[str, str] = {}
    for number, task in enumerate(_load(file)["examples"]):
        text, question = _match(r"Passage: (.*?)\s*\nQuestion: (.*?)\s*", task["input"])
        if len(task["target"]) == 1:
            passage = _passage(texts.setdefault(text, f"quoref:{number}"), "", text)
            yield _example("quoref", str(number), question, [task["target"][0].removesuffix(".")], passage), passage


def read_vitaminc(file: Path) -> Iterator[Pair]:
    """VitaminC's claims with the sentence of Wikipedia that says whether they hold."""
    texts: dict[str, str] = {}
    for number, task in enumerate(_load(file)["examples"]):
        evidence, claim = task["input"].split("\nClaim: ")
        title, _, text = evidence.partition(": ")
        passage = _passage(texts.setdefault(evidence, f"vitaminc:{number}"), decode_fever_title(title), text)
        yield _claim("vitaminc", str(number), claim, _label(task), passage), passage


def read_fever(file: Path, gold: dict[str, list[Passage]]) -> Iterator[Pair]:
    """FEVER's claims with their label; `gold` names, by a claim's id, the leads that a human found to decide it."""
    for task in _load(file)["examples"]:
        if passages := gold.get(str(task["id"])):
            claim = _match(r".*?claim was made: (.*)\nQ: Was this claim true or false\?", task["input"])[0]
            example = _claim("fever", str(task["id"]), claim, _label(task), passages[0])
            yield example.model_copy(update={"gold": [passage.id for passage in passages]}), passages[0]


def read_wikidata(file: Path, leads: dict[str, Passage]) -> Iterator[tuple[str, Example, Passage]]:
    """Wikidata's facts about the subject of a lead that holds the object, each with its relation."""
    for number, task in enumerate(_load(file)["examples"]):
        found = re.fullmatch(r"The ([a-z ]*?) of (.*) is", task["input"])  # no "language used in Kingdom of Croatia"
        relation, subject = found.groups() if found else ("", "")
        passage = leads.get(page_id(subject))
        answers = task["target"] if isinstance(task["target"], list) else [task["target"]]
        if passage and find_answer(passage.text, answers):
            yield relation, _example("wikidata", str(number), task["input"], answers, passage), passage


def _match(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text, re.DOTALL)
    assert found, text
    return found.groups()


def _load(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _passage(id: str, title: str, text: str) -> Passage:
    return Passage(id=id, title=title, text=" ".join(text.replace("\ufffd", " ").split()))


def _example(dataset: str, source: str, question: str, answers: list[str], passage: Passage) -> Example:
    said = find_answer(passage.text, answers) or answers[0]
    return Example(
        id=f"{dataset}-{source}",
        dataset=dataset,
        question=" ".join(question.split()),
        output=[Segment(text=said, passage=passage.id)],
        answers=answers,
    )


def _claim(dataset: str, source: str, claim: str, label: str, passage: Passage) -> Example:
    return Example(
        id=f"{dataset}-{source}",
        dataset=dataset,
        instruction=VERIFY,
        question=" ".join(claim.split()),
        output=[Segment(text=label, passage=passage.id)],
        answers=[_LABELS[label]],
    )


def _label(task: dict[str, Any]) -> str:
    (label,) = (label.lower() for label, score in task["target_scores"].items() if score)
    return label
