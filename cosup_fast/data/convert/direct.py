"""Published data named where a corpus or examples are: `tevatron:train.jsonl`, `beir:datasets/scifact:train`.

They are converted once into a folder of `COSUP_HOME`, which is found again as long as the source has its size and time,
and whose files are used as long as they are what was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from cosup_fast.data.convert.beir import convert_beir
from cosup_fast.data.convert.judged import convert_dpr, convert_sentence_transformers, convert_tevatron
from cosup_fast.data.convert.output import CONVERTED, PASSAGES
from cosup_fast.data.convert.self_rag import convert_self_rag
from cosup_fast.data.prepared.verify import recorded, verify
from cosup_fast.data.records import DataError, nearest

VERSION = 2
"""Of what conversions write; with another one sources are converted again."""

FORMS: dict[str, Callable[..., Any]] = {
    "beir": convert_beir,
    "dpr": lambda source, folder: convert_dpr([source], folder),
    "self-rag": convert_self_rag,
    "sentence-transformers": lambda source, folder: convert_sentence_transformers([source], folder),
    "tevatron": lambda source, folder: convert_tevatron([source], folder),
}


def form_of(spec: str) -> str | None:
    """The form that a source names, if it names one."""
    form, separator, _ = spec.partition(":")
    return form if separator and form in FORMS else None


def converted(spec: str, kind: str, home: Path) -> Path:
    """The file of passages (`kind` is corpus) or of examples that `FORM:PATH[:SPLIT]` names.

    Raises:
        DataError: there is no such source or split, or its rows do not have that form.
    """
    form, _, place = spec.partition(":")
    source, split = Path(place), None
    if not source.exists() and ":" in place:
        rest, _, split = place.rpartition(":")
        source = Path(rest)
    if not source.exists():
        raise DataError(f"{kind} {spec!r}: expected a file or folder, found none at {place!r}")
    name = f"{form}-{source.stem}-{_state(form, source)}"
    folder = home / "converted" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):  # ranks start together: one of them converts
        if not (folder / CONVERTED.marker).is_file():
            FORMS[form](source, folder)
    remedy = f"remove {folder}, and it is converted again"
    if kind == "corpus":
        verify(folder, [PASSAGES], info=CONVERTED.marker, remedy=remedy)
        return folder / PASSAGES
    files = recorded(folder, CONVERTED.marker, remedy)
    splits = [name.removesuffix(".jsonl") for name in files if name != PASSAGES]
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        found = "none" if split is None else f"{split!r}"
        raise DataError(
            f"{kind} {spec!r}: expected one of the splits {', '.join(splits)}, as in {form}:{source}:{splits[0]}, "
            f"found {found}{nearest(split or '', splits)}"
        )
    verify(folder, [f"{split}.jsonl"], info=CONVERTED.marker, remedy=remedy)
    return folder / f"{split}.jsonl"


def _state(form: str, source: Path) -> str:
    """Changes with any file of the source."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    stats = [(path.resolve().as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((VERSION, form, stats)).encode()).hexdigest()[:12]
