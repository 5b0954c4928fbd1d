"""Training sets made of the leads that may be trained on, each with a dev split over the leads kept for that.

No page that a test asks about is touched, and no question that a test asks is asked: `check_splits` proves it before a
set is put in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cosup_fast.data.prepared.splits import SPLITS, check_splits, page_roles
from cosup_fast.data.prepared.words import tokens
from cosup_fast.data.records import Example, Passage, read_examples, read_passages, write_jsonl

AFTER = ("wiki-leads", "cloze", "questions")  # what these sets are made of, or checked against


def build_from_leads(
    make: Callable[[Iterable[Passage]], Iterable[Example]],
) -> Callable[[list[Path], Path, Path], None]:
    """How a set is prepared whose examples `make` makes of the leads of one split."""

    def build(packages: list[Path], home: Path, out: Path) -> None:
        leads = read_passages(home / "wiki-leads" / "passages.jsonl")
        roles = page_roles(leads)
        made = {role: make([lead for lead in leads if roles[lead.id] == role]) for role in ("train", "dev")}
        write_training(made, leads, home, out)

    return build


def write_training(made: Mapping[str, Iterable[Example]], leads: list[Passage], home: Path, out: Path) -> None:
    """Writes a file a split, of the questions that no other split asks.

    Raises:
        DataError: a page that a test, or another split, is about.
    """
    known = {
        split: [e for name in ("cloze", "questions") for e in read_examples(home / name / f"{split}.jsonl", None)]
        for split in SPLITS
    }
    asked = {tuple(tokens(example.question)) for examples in known.values() for example in examples}
    splits = {}
    for split, examples in made.items():
        splits[split] = []
        for example in examples:
            key = tuple(tokens(example.question))
            if key not in asked:
                asked.add(key)
                splits[split].append(example)
    check_splits(
        {split: [*known[split], *splits.get(split, [])] for split in SPLITS}, {passage.id for passage in leads}
    )
    for split, examples in splits.items():
        write_jsonl(out / f"{split}.jsonl", examples)
