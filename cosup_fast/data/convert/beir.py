"""BEIR's folders to passages and examples: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (Thakur et al. 2021)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from cosup_fast.data.convert.output import Output, check_names, identifier, read, string, text
from cosup_fast.data.convert.rows import Row, read_rows
from cosup_fast.data.records import DataError, Example, Passage, field_names, validate

COLUMNS = ("query-id", "corpus-id", "score")


class Judgement(NamedTuple):
    """A line of a qrels file."""

    where: str
    query: str
    passage: str
    relevant: bool


def convert_beir(
    source: str | Path, folder: str | Path, *, skip_malformed: bool = False, progress: bool = True
) -> dict[str, int]:
    """A BEIR folder to `passages.jsonl` and a file of examples for each of its qrels, such as `train.jsonl`.

    A passage with a score above 0 is gold; one that was judged and got 0 or less is a hard negative.

    Args:
        source: the folder.
        folder: where to write.
        skip_malformed: leave malformed lines out, with their numbers on stderr, instead of stopping.
        progress: show progress bars on stderr.

    Returns:
        How many lines were read, and what became of them.

    Raises:
        DataError: a file is missing, or a malformed line: also one that names an unknown query or passage.
    """
    source, counts = Path(source), Counter()
    judged = sorted((source / "qrels").glob("*.tsv"))
    for path in (source / "corpus.jsonl", source / "queries.jsonl"):
        if not path.is_file():
            raise DataError(f"{source}: expected a BEIR folder with {path.name}, found none")
    if not judged:
        raise DataError(f"{source}: expected a BEIR folder with qrels/SPLIT.tsv, found none")
    check_names("beir", (f"{path.stem}.jsonl" for path in judged))
    options: dict[str, Any] = {"skip": skip_malformed, "bar": progress}

    queries: dict[str, str] = {}

    def query(where: str, number: int, record: dict[str, Any]) -> tuple[str, str]:
        name, question = _id(where, record), text(where, record, "text")
        if name in queries:
            raise DataError(f"{where}: _id: expected a new id, found {name!r} again")
        return name, question

    path = source / "queries.jsonl"
    for _, (name, question) in read(path, read_rows(path), query, counts, "queries", **options):
        queries[name] = question

    def judgement(where: str, number: int, record: dict[str, Any]) -> Judgement:
        if missing := [name for name in COLUMNS if name not in record]:
            raise DataError(f"{where}: {missing[0]}: expected a column of this name, found only {field_names(record)}")
        asked, passage, score = (record[name] for name in COLUMNS)
        if asked not in queries:
            raise DataError(f"{where}: query-id: expected the id of a query, found {asked!r}")
        try:
            return Judgement(where, asked, passage, int(score) > 0)
        except ValueError:
            raise DataError(f"{where}: score: expected a whole number, found {score!r}") from None

    splits = {
        path: [found for _, found in read(path, read_rows(path), judgement, counts, "judgements", **options)]
        for path in judged
    }
    if unjudged := [path for path, judgements in splits.items() if not judgements]:
        raise DataError(f"{unjudged[0]}: expected {', '.join(COLUMNS)} and a row for each judgement, found no row")
    cited = {one.passage for judgements in splits.values() for one in judgements}
    known: set[str] = set()
    empty: set[str] = set()

    def document(where: str, number: int, record: dict[str, Any]) -> Passage | str:
        if (passage := beir_passage(where, record)) is None:
            return _id(where, record)
        output.check_passages(where, [passage])
        return passage

    path = source / "corpus.jsonl"
    with Output(folder) as output:
        for _, found in read(path, read_rows(path), document, counts, "documents", **options):
            if isinstance(found, str):
                counts["empty documents"] += 1
                empty.add(found)
                continue
            if found.id in cited:
                known.add(found.id)
            output.add_passages([found])

        def of_known(where: str, number: int, record: dict[str, Any]) -> Judgement:
            one = Judgement(**record)
            if one.passage not in known and one.passage not in empty:
                raise DataError(f"{where}: corpus-id: expected the id of a passage, found {one.passage!r}")
            return one

        for path, judgements in splits.items():
            rows = (Row(one.where, 0, 0, one._asdict()) for one in judgements)
            of_query: dict[str, list[Judgement]] = {}
            for _, one in read(path, rows, of_known, counts, "judgements used", skip=skip_malformed, bar=False):
                of_query.setdefault(one.query, []).append(one)
            for name, found in of_query.items():
                gold = list(dict.fromkeys(one.passage for one in found if one.relevant and one.passage in known))
                if not gold:
                    counts["without a gold passage"] += 1
                    continue
                others = dict.fromkeys(one.passage for one in found if not one.relevant and one.passage in known)
                record = {
                    "id": name,
                    "question": queries[name],
                    "output": [],
                    "gold": gold,
                    "negatives": [other for other in others if other not in gold],
                }
                output.write(f"{path.stem}.jsonl", validate(found[0].where, Example, record))
                counts["examples"] += 1
        if not counts["examples"]:
            raise DataError(f"{source}: expected judgements with a score above 0, found none")
        counts["passages"] = output.passages
        output.finish("beir", [source / "corpus.jsonl", source / "queries.jsonl", *judged], counts)
    return dict(+counts)


def beir_passage(where: str, record: dict[str, Any]) -> Passage | None:
    """A passage of a corpus; None for an empty one. A title without a text is the text."""
    title, body = (string(where, record, key, "").strip() for key in ("title", "text"))
    if not title and not body:
        return None
    fields = {"title": title if body else "", "text": body or title}
    return validate(where, Passage, {"id": _id(where, record), **fields})


def _id(where: str, record: dict[str, Any]) -> str:
    if not (name := identifier(where, record, "_id")):
        raise DataError(f"{where}: _id: expected a value, found only {field_names(record)}")
    return name
