"""What is evaluated: test sets of examples, in the project's JSONL or as KILT publishes its data sets.

A KILT line is `{"id", "input", "output": [{"answer", "provenance": [{"wikipedia_id", "title"}, ...]}, ...]}` (Petroni
et al. 2021, arXiv 2009.02252). Its gold pages are matched with the corpus by id (a passage `123` or `kilt:123`, or a
paragraph of it, `metrics.is_gold`), and a page with no such passage by title.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosup_fast.data.convert.kilt import Question, dataset_of, read_question
from cosup_fast.data.convert.rows import read_rows
from cosup_fast.data.records import DataError, Example, Passage, nearest
from cosup_fast.data.sources import load_examples
from cosup_fast.evaluation.metrics import page_of

IN_DOMAIN, OUT_OF_DOMAIN = "in-domain", "out-of-domain"
_DOMAIN_WORDS = {"in": IN_DOMAIN, "indomain": IN_DOMAIN, "out": OUT_OF_DOMAIN, "ood": OUT_OF_DOMAIN}


@dataclass(frozen=True)
class TestSet:
    """Examples of one source.

    Args:
        source: the file or the name they come from.
        examples: they may be of several data sets (`Example.dataset`).
        domain: `in-domain`, `out-of-domain`, or empty when that is not known; or one for each data set.
        corpus: the name of the corpus that they search, where a system has several.
    """

    __test__ = False  # its name begins as pytest's test classes do

    source: str
    examples: Sequence[Example]
    domain: str | Mapping[str, str] = ""
    corpus: str = ""

    def domain_of(self, example: Example) -> str:
        """The domain of one of the examples."""
        return self.domain if isinstance(self.domain, str) else self.domain.get(example.dataset, "")


def load_test_sets(
    sources: Sequence[str],
    corpus: Mapping[str, Passage],
    *,
    in_domain: Sequence[str] = (),
    out_of_domain: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    allow_missing_gold: bool = False,
) -> list[TestSet]:
    """Reads test sets and says which domain each is of.

    A domain is given by the name of a source or of a data set; else a source whose file name ends in `-in` or `-out`
    (`test-out`, `nq_ood.jsonl`) is of that domain.

    Args:
        sources: JSONL files of examples or of KILT, prepared sets, or `hf:owner/name:split`.
        corpus: what can be retrieved, by id; empty for a system that retrieves nothing, then no gold id is checked.
        in_domain: sources and data sets that training has seen.
        out_of_domain: those that it has not.
        limit: use only so many examples of all, drawn by the seed.
        seed: of that draw.
        allow_missing_gold: keep gold ids that the corpus lacks; they count as never found.

    Raises:
        DataError: what `load_examples` refuses, a gold passage that the corpus lacks, a broken KILT line.
        ValueError: no source; a name in both domains, or that nothing here has.
    """
    if not sources:
        raise ValueError("evaluation needs at least one example set, got none")
    if both := sorted(set(in_domain) & set(out_of_domain)):
        raise ValueError(f"{both[0]!r} is named as in-domain and as out-of-domain: choose one")
    loaded = [(source, _load(source, corpus, allow_missing_gold)) for source in sources]
    domains = dict.fromkeys(in_domain, IN_DOMAIN) | dict.fromkeys(out_of_domain, OUT_OF_DOMAIN)
    datasets = {example.dataset for _, examples in loaded for example in examples}
    for name in domains:
        if name not in datasets and name not in sources:
            known = [*sources, *sorted(datasets - {""})]
            raise ValueError(f"{name!r} has a domain but no example{nearest(name, known)}: found {', '.join(known)}")
    if limit is not None:
        every = [(number, i) for number, (_, examples) in enumerate(loaded) for i in range(len(examples))]
        kept = set(random.Random(seed).sample(every, min(limit, len(every))))
        loaded = [
            (source, [example for i, example in enumerate(examples) if (number, i) in kept])
            for number, (source, examples) in enumerate(loaded)
        ]
    sets = []
    for source, examples in loaded:
        default = domains.get(source) or _domain_by_name(source)
        names = {example.dataset: domains.get(example.dataset) or default for example in examples}
        same = len(set(names.values())) <= 1
        sets.append(TestSet(source, examples, next(iter(names.values()), default) if same else names))
    return [test_set for test_set in sets if test_set.examples]


def read_kilt(path: str | Path, corpus: Mapping[str, Passage]) -> list[Example]:
    """The examples of a KILT file, without outputs; the data set is the file's name up to `-dev`, `-test` or `-train`.

    Raises:
        DataError: a broken line, with its number.
    """
    path = Path(path)
    dataset = dataset_of(path)
    rows: dict[str, Question] = {}
    for row in read_rows(path):
        if isinstance(row.record, DataError):
            raise row.record
        question = read_question(row.where, row.record, dataset)
        if question.example.id in rows:
            raise DataError(f"{row.where}: id: expected a new id, found {question.example.id!r} again")
        rows[question.example.id] = question
    if not rows:
        raise DataError(f"{path}: expected at least one example, found an empty file")
    named = {(s.page, s.title) for question in rows.values() for answer in question.answers for s in answer.sources}
    names = _gold_names(named, corpus)
    examples = []
    for example, answers in rows.values():
        pages = [_unique(filter(None, (names[s.page, s.title] for s in answer.sources))) for answer in answers]
        sets = [found for found in pages if found]
        gold = _unique(name for found in sets for name in found)
        # Two annotators may name the same pages.
        several = [list(found) for found in dict.fromkeys(tuple(sorted(found)) for found in sets)]
        examples.append(example.model_copy(update={"gold": gold, "gold_sets": several if len(several) > 1 else []}))
    return examples


def _load(source: str, corpus: Mapping[str, Passage], allow_missing_gold: bool) -> list[Example]:
    kilt = _is_kilt(source)
    examples = read_kilt(source, corpus) if kilt else load_examples(source, None, allow_no_retrieval=True)
    if not corpus:
        return examples
    if not allow_missing_gold:
        wanted = {name for e in examples for name in (*e.gold, *e.cited, *e.negatives)}
        known = _known(wanted, corpus)
        lost = [(example.id, gold) for example in examples for gold in example.gold if gold not in known]
        if lost and kilt:
            raise DataError(
                f"{source}: example {lost[0][0]!r}: expected gold pages of the corpus by id or title, found "
                f"{lost[0][1]!r} and {len(lost) - 1} more that it lacks: choose the corpus that the data set is of, or "
                "--allow-missing-gold to count them as never found"
            )
        if wanted - known:
            load_examples(source, known, allow_no_retrieval=True)  # says where
        return examples
    # What an output cites would have to be read by Gen.
    return [e if all(name in corpus for name in e.cited) else e.model_copy(update={"output": []}) for e in examples]


def _is_kilt(source: str) -> bool:
    """Whether a source is a file whose first line has KILT's `input`."""
    if not Path(source).is_file():
        return False
    with open(source, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        row = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False  # `load_examples` says what is wrong
    return isinstance(row, dict) and "input" in row and "question" not in row


def _known(wanted: Collection[str], corpus: Mapping[str, Passage]) -> set[str]:
    """Those of the wanted names that are ids of the corpus, or pages that one of its passages is a paragraph of."""
    known = {name for name in wanted if name in corpus}
    if len(known) < len(wanted):  # one pass over a corpus that may be larger than memory
        known |= {page for name in corpus if (page := page_of(name)) in wanted}
    return known


def _gold_names(pages: Collection[tuple[str, str]], corpus: Mapping[str, Passage]) -> dict[tuple[str, str], str]:
    """What the corpus calls KILT's pages, by id or else by title; their own id, or nothing, where it has none."""
    names = {page: (page[0], f"kilt:{page[0]}") for page in pages if page[0]}
    known = _known({name for pair in names.values() for name in pair}, corpus)
    found = {page: next((name for name in pair if name in known), "") for page, pair in names.items()}
    titles = {title for page, title in pages if title and not found.get((page, title))}
    by_title = {p.title: page_of(p.id) for p in corpus.values() if p.title in titles} if titles else {}
    return {page: found.get(page) or by_title.get(page[1], page[0]) for page in pages}


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _domain_by_name(source: str) -> str:
    words = re.split(r"[^a-z]+", Path(source).stem.lower())
    return _DOMAIN_WORDS.get(next((word for word in reversed(words) if word), ""), "")
