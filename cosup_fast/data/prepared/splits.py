"""Which question trains, tunes and tests: splits by gold page, so that no tested passage was ever a training answer.

A page is a test page when its topic is held out, or when it answers a question of a held-out data set; every other
page goes to train, dev or test by a hash of its id. A question goes where its gold page goes. Test questions are
in-domain (`test-in`) when topic and data set were both seen in training, else out-of-domain (`test-out`).
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cosup_fast.data.prepared.words import tokens
from cosup_fast.data.records import DataError, Example, Passage

SPLITS = ("train", "dev", "test-in", "test-out")
HELD_OUT_TOPICS = frozenset({"Arts", "Physical sciences"})
HELD_OUT_DATASETS = frozenset({"squad", "webquestions", "curatedtrec", "fever"})
TABLE = Path(__file__).with_name("wiki_leads_splits.tsv")


class Item(NamedTuple):
    """A line of the table: a question, named by data set and place in its source, and its gold page."""

    dataset: str
    source: str
    page: str
    split: str


def read_table(path: Path = TABLE) -> list[Item]:
    """The committed assignment of every question."""
    with open(path, encoding="utf-8", newline="") as file:
        return [Item(*row) for row in list(csv.reader(file, delimiter="\t"))[1:]]


def write_table(items: Iterable[Item], path: Path = TABLE) -> None:
    """Writes the assignment, sorted."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(Item._fields)
        writer.writerows(sorted(items))


def assign(gold: Iterable[tuple[str, str, str]], passages: Iterable[Passage]) -> list[Item]:
    """The split of every `(dataset, source, page)`."""
    gold = list(gold)
    topic = {passage.id: passage.topic for passage in passages}
    tested = {page for dataset, _, page in gold if dataset in HELD_OUT_DATASETS}
    items = []
    for dataset, source, page in gold:
        held_out = topic[page] in HELD_OUT_TOPICS or dataset in HELD_OUT_DATASETS
        role = "test" if held_out or page in tested else _role(page)
        split = role if role != "test" else "test-out" if held_out else "test-in"
        items.append(Item(dataset, source, page, split))
    return items


def page_roles(passages: Iterable[Passage], table: Iterable[Item] | None = None) -> dict[str, str]:
    """`train`, `dev` or `test` of every lead, also of those that no question of the table is about."""
    roles = {
        item.page: item.split if item.split in ("train", "dev") else "test"
        for item in (read_table() if table is None else table)
    }
    return {
        passage.id: roles.get(passage.id) or ("test" if passage.topic in HELD_OUT_TOPICS else _role(passage.id))
        for passage in passages
    }


def check_splits(splits: Mapping[str, Iterable[Example]], passages: Collection[str]) -> None:
    """Raises `DataError` unless the splits are disjoint.

    `train`, `dev` and tests (every other name) share no passage that is gold or in an output, no question's words occur
    in two splits, and every passage named is one of `passages`. Two tests may share a passage.
    """
    first_use: dict[str, tuple[str, str]] = {}
    first_asked: dict[tuple[str, ...], tuple[str, str]] = {}
    for split, examples in splits.items():
        role = split if split in ("train", "dev") else "test"
        for example in examples:
            where = f"{split}: example {example.id!r}"
            for page in dict.fromkeys([*example.gold, *example.cited]):
                if page not in passages:
                    raise DataError(f"{where}: expected gold passages of the corpus, found {page!r}")
                used_by, other = first_use.setdefault(page, (role, example.id))
                if used_by != role:
                    raise DataError(
                        f"{where}: expected gold passages of no other split, found {page!r}, which is gold for "
                        f"{other!r} of {used_by}"
                    )
            asked_in, other = first_asked.setdefault(tuple(tokens(example.question)), (split, example.id))
            if asked_in != split:
                raise DataError(
                    f"{where}: expected a question of no other split, found that of {other!r} of {asked_in}: "
                    f"{example.question!r}"
                )


def _role(page: str) -> str:
    place = int(hashlib.sha256(page.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if place < 0.75 else "dev" if place < 0.83 else "test"
