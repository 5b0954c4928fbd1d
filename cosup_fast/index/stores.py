"""Indexes by name, wherever they live: a folder, or `milvus:URI#COLLECTION`. The command line opens them here alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosup_fast.data.records import Passage
from cosup_fast.index.build import Options
from cosup_fast.index.collection import PREFIX
from cosup_fast.index.nonparametric import NonparametricIndex
from cosup_fast.index.origin import STAMP
from cosup_fast.index.search import Engine
from cosup_fast.index.sequence_index import SequenceIndex

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel


def in_milvus(name: str | Path) -> bool:
    """Whether a name is that of an index in Milvus."""
    return str(name).startswith(PREFIX)


def load_index(
    name: str | Path,
    model: CoSupervisionModel,
    *,
    allow_stale: bool = False,
    engine: Engine = "auto",
    verify: bool = True,
) -> NonparametricIndex:
    """Opens an index for the model that made it.

    Args:
        name: a folder or `milvus:URI#COLLECTION`.
        model: the checkpoint whose queries will be searched.
        allow_stale: take an index of other weights or of another template; its width must still be the model's.
        engine: how to search a folder; see `SequenceIndex.load`.
        verify: compare the files of a folder with their checksums.

    Raises:
        ValueError: what `SequenceIndex.load` or `MilvusIndex.load` refuses, or an engine for Milvus, which searches
            itself.
        ImportError: faiss or pymilvus is needed and not installed.
    """
    if not in_milvus(name):
        return SequenceIndex.load(name, model, allow_stale=allow_stale, engine=engine, verify=verify)
    from cosup_fast.index.milvus import MilvusIndex

    if engine != "auto":
        raise ValueError(f"engine={engine!r}: {name} is searched by Milvus, leave the engine out")
    return MilvusIndex.load(str(name), model, allow_stale=allow_stale)


def open_index(name: str | Path, *, verify: bool = True) -> NonparametricIndex:
    """Opens an index whatever made it, to look at it or to delete from it; see `load_index`."""
    if not in_milvus(name):
        return SequenceIndex.open(name, verify=verify)
    from cosup_fast.index.milvus import MilvusIndex

    return MilvusIndex.open(str(name))


def index_exists(name: str | Path) -> bool:
    """Whether there is an index of this name."""
    if not in_milvus(name):
        return (Path(name) / STAMP).is_file()
    from cosup_fast.index.milvus import MilvusIndex

    return MilvusIndex.exists(str(name))


def build_index(
    model: CoSupervisionModel,
    corpus: str | Path | Sequence[Passage],
    name: str | Path,
    work: Path,
    *,
    factory: str | None = None,
    parameters: str = "",
    options: Options | None = None,
) -> int:
    """Embeds a corpus into an index of this name, and returns the number of its passages.

    Args:
        model: embeds the passages.
        corpus: passages, or what `open_corpus` takes.
        name: a folder or `milvus:URI#COLLECTION`.
        work: a folder that all ranks see, under which an index in Milvus keeps its shards until they are sent.
        factory: see `SequenceIndex.build` and `MilvusIndex.build`.
        parameters: of the search of what `factory` makes.
        options: how to embed.
    """
    if not in_milvus(name):
        return len(SequenceIndex.build(model, corpus, name, factory=factory, parameters=parameters, options=options))
    from cosup_fast.index.milvus import MilvusIndex

    return MilvusIndex.build(model, corpus, str(name), work, factory=factory, parameters=parameters, options=options)
