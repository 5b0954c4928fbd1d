"""Where data and models come from: a file, a prepared set, or a Hugging Face data set.

A source is named by one string: a path to a JSONL file; the name of a prepared set (`wiki-leads`,
`questions/train`, `smollm2-135m`); `hf:owner/name[:split]`, read through `datasets`; or data in a published
form (`tevatron:train.jsonl`), which are converted first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from cosup_fast.data.convert.direct import FORMS, converted, form_of
from cosup_fast.data.hub import hub_rows, without_none
from cosup_fast.data.mapped import MappedCorpus
from cosup_fast.data.prepared.catalog import CATALOG, PASSAGES, is_corpus
from cosup_fast.data.prepared.verify import verify
from cosup_fast.data.records import (
    DataError,
    Example,
    Passage,
    R,
    check_example,
    nearest,
    read_examples,
    read_passages,
    validate,
)


def home() -> Path:
    """The folder of prepared sets: `COSUP_HOME`, or `~/.cache/cosup-fast`."""
    return Path(os.environ.get("COSUP_HOME") or "~/.cache/cosup-fast").expanduser()


def load_corpus(spec: str) -> list[Passage]:
    """The passages that `spec` names, ids unique."""
    if spec.startswith("hf:"):
        return [passage for _, passage in _read_hub(spec, Passage)]
    return read_passages(find(spec, "corpus"))


def open_corpus_by_id(spec: str, *, checksum: bool = False) -> Mapping[str, Passage]:
    """The passages that `spec` names, by id; the texts of a file stay on disk (see `MappedCorpus`)."""
    if spec.startswith("hf:"):
        return {passage.id: passage for passage in load_corpus(spec)}
    return MappedCorpus(find(spec, "corpus"), home() / "corpora", checksum=checksum)


def load_examples(spec: str, passages: Collection[str] | None, allow_no_retrieval: bool = False) -> list[Example]:
    """The examples that `spec` names; the passages that they name are all among the ids `passages`, if given."""
    if not spec.startswith("hf:"):
        return read_examples(find(spec, "examples"), passages, allow_no_retrieval)
    rows = _read_hub(spec, Example)
    for where, example in rows:
        check_example(where, example, passages, allow_no_retrieval)
    return [example for _, example in rows]


def resolve_model(spec: str) -> str:
    """What `from_pretrained` takes for `spec`: a folder, a prepared model's folder, or a hub name as it is."""
    if spec.startswith("hf:"):
        return spec.removeprefix("hf:")
    if spec in CATALOG and CATALOG[spec].kind == "model":
        return str(_prepared(spec))
    if Path(spec).is_dir():
        return spec
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec) and not Path(spec.split("/")[0]).exists():
        return spec
    names = [name for name, entry in CATALOG.items() if entry.kind == "model"]
    raise DataError(
        f"model {spec!r}: expected a folder, a hub name (owner/name) or a prepared model ({', '.join(names)}), "
        f"found none of these{nearest(spec, names)}"
    )


def resolve_checkpoint(folder: Path) -> Path:
    """The folder, or that of a prepared checkpoint where it has the name of one and is none."""
    name = str(folder)
    if name in CATALOG and CATALOG[name].kind == "checkpoint" and not folder.exists():
        return _prepared(name)
    return folder


def _sets(kind: str) -> dict[str, tuple[str, str]]:
    """The prepared corpora or example sets: spec -> (prepared set, file)."""
    found = {}
    for name, entry in CATALOG.items():
        for file in entry.files:
            if is_corpus(file) == (kind == "corpus"):
                found[name if file == PASSAGES else f"{name}/{file.removesuffix('.jsonl')}"] = (name, file)
    return found


def find(spec: str, kind: str) -> Path:
    """The file that `spec` names: its own path, or one of a prepared set; `kind` is corpus or examples."""
    if form_of(spec) is not None:
        return converted(spec, kind, home())
    sets = _sets(kind)
    if spec in sets:
        name, file = sets[spec]
        return _prepared(name, file)
    if Path(spec).is_file():
        return Path(spec)
    raise DataError(
        f"{kind} {spec!r}: expected a JSONL file, a prepared set ({', '.join(sets)}), hf:owner/name[:split] "
        f"or FORM:PATH with one of the forms {', '.join(FORMS)}, found none of these{nearest(spec, sets)}"
    )


def _prepared(name: str, file: str | None = None) -> Path:
    """The folder of a prepared set, or a file of it, compared with what was prepared."""
    if not CATALOG[name].is_ready(home()):
        found = "found it as another version made it" if (home() / name).is_dir() else "found nothing"
        raise DataError(f"{name!r}: expected it prepared in {home()}, {found}: run `cosup-fast data prepare {name}`")
    verify(home() / name, None if file is None else [file])
    return home() / name / (file or "")


def _read_hub(spec: str, kind: type[R]) -> list[tuple[str, R]]:
    found: dict[str, tuple[str, R]] = {}
    place, rows = hub_rows(spec)
    for number, row in enumerate(rows):
        where = f"{place}:row {number}"
        record = validate(where, kind, without_none(row))
        if record.id in found:
            raise DataError(f"{where}: id: expected a new id, found {record.id!r} again")
        found[record.id] = (where, record)
    if not found:
        raise DataError(f"{spec}: expected at least one {kind.__name__.lower()}, found an empty split")
    return list(found.values())
