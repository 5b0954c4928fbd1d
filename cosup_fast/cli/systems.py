"""What `cosup-fast evaluate` and `compare` do between their options and a report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosup_fast.config import config_of
from cosup_fast.data.records import nearest
from cosup_fast.evaluation.report import HTML, REPORT
from cosup_fast.evaluation.run import ANSWERS, FLUENCY, VERDICTS
from cosup_fast.evaluation.systems import (
    DenseRetriever,
    GoldRetriever,
    IndexRetriever,
    PairRetriever,
    RandomRetriever,
    System,
)
from cosup_fast.files import check_replaceable

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

KINDS = ("co-supervised", "closed-book", "gold", "dense", "pair", "random")


def split_name(name: str) -> tuple[str, str]:
    """The kind of a system and what stands behind its colon: (`dense`, `minilm`).

    Raises:
        ValueError: no such kind, or a colon too many or too few.
    """
    kind, _, argument = name.partition(":")
    if kind not in KINDS:
        raise ValueError(
            f"--system {name!r} is unknown{nearest(kind, KINDS)}: expected co-supervised, closed-book, gold, "
            "dense:NAME, pair:RUN or random"
        )
    if kind == "dense":
        argument = argument or "minilm"
    elif kind == "pair" and not argument:
        raise ValueError("--system pair needs the run that retrieves: --system pair:runs/nsp-only")
    elif kind != "pair" and argument:
        raise ValueError(f"--system {name!r}: {kind} takes nothing behind a colon")
    return kind, argument


def open_system(
    name: str,
    checkpoint: Path,
    load_model: Callable[[Path], CoSupervisionModel],
    *,
    index: Path | None = None,
    corpus: str | None = None,
    seed: int = 0,
    allow_stale: bool = False,
) -> System:
    """The system that `--system` names.

    Args:
        name: as on the command line.
        checkpoint: the run or checkpoint whose Gen writes.
        load_model: loads one.
        index: for `co-supervised` and `pair`; by default the one beside the checkpoint that retrieves.
        corpus: the passages of the other retrievers; by default those of the checkpoint's run.
        seed: of `random`.
        allow_stale: take an index that another checkpoint made.

    Raises:
        ValueError: what `split_name` or the retriever refuses; an index or a corpus that this system does not read.
    """
    from cosup_fast.data.sources import load_corpus
    from cosup_fast.index import SequenceIndex

    kind, argument = split_name(name)
    searching = kind in ("co-supervised", "pair")
    if index and not searching:
        raise ValueError(f"--system {name} searches no index: leave out --index {index}")
    if corpus and (searching or kind == "closed-book"):
        reads = "what its index holds" if searching else "no passages"
        raise ValueError(f"--system {name} reads {reads}: leave out --corpus {corpus}")
    model = load_model(checkpoint)
    sources = {"checkpoint": str(checkpoint)}
    retriever: Any = None
    if searching:
        retrieving = Path(argument) if kind == "pair" else checkpoint
        searcher = load_model(retrieving) if kind == "pair" else model
        index = index or retrieving / "index"
        loaded = SequenceIndex.load(index, searcher, allow_stale=allow_stale)
        retriever = (PairRetriever if kind == "pair" else IndexRetriever)(searcher, loaded)
        sources |= {"index": str(index)} | ({"retriever": argument} if kind == "pair" else {})
    elif kind != "closed-book":
        corpus = corpus or corpus_of(checkpoint)
        passages = load_corpus(corpus)
        sources["corpus"] = corpus
        if kind == "gold":
            retriever = GoldRetriever(passages)
        elif kind == "random":
            retriever = RandomRetriever(passages, seed)
        else:
            template = model.template.config.passage
            retriever = DenseRetriever(argument, passages, template, device=model.device, progress=True)
    return System(f"dense:{argument}" if kind == "dense" else name, model, retriever, sources)


def output_folder(output: Path | None, checkpoint: Path, system: str) -> Path:
    """Where an evaluation is kept, by default `evaluation/SYSTEM` beside the checkpoint.

    Raises:
        ValueError: the folder holds something that is no evaluation.
    """
    kind, argument = split_name(system)
    name = "-".join(filter(None, (kind, re.sub(r"[^\w.-]+", "-", Path(argument).name))))
    return check_replaceable(output or checkpoint / "evaluation" / name, ANSWERS)


def clear(folder: Path) -> None:
    """Removes an evaluation, and nothing else that may lie there."""
    for file in (ANSWERS, VERDICTS, FLUENCY, REPORT, HTML):
        (folder / file).unlink(missing_ok=True)


def corpus_of(checkpoint: Path) -> str:
    """The corpus of a checkpoint's run, or the default one."""
    run = config_of(checkpoint)
    return run.data.corpus if run else "wiki-leads"


def fluency_model(name: str, checkpoint: Path) -> str | None:
    """The name of the fluency model: for `base`, what Gen of the run began as; None for `none`, or when unknown."""
    if name != "base":
        return None if name == "none" else name
    run = config_of(checkpoint)
    return run.model.gen if run else None
