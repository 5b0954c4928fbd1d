"""What `cosup-fast evaluate` does between its options and a report."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosup_fast.config import config_of
from cosup_fast.evaluation.corpus import Corpus
from cosup_fast.evaluation.html import HTML
from cosup_fast.evaluation.kinds import split_name
from cosup_fast.evaluation.report import REPORT
from cosup_fast.evaluation.run import ANSWERS, FLUENCY, VERDICTS
from cosup_fast.evaluation.systems import System
from cosup_fast.evaluation.workbench import Workbench
from cosup_fast.files import FolderKind, Journal, check_replaceable

if TYPE_CHECKING:
    import torch

    from cosup_fast.model import CoSupervisionModel


EVALUATION = FolderKind("an evaluation", ANSWERS, files=("*",))


def open_system(
    name: str,
    checkpoint: Path,
    load_model: Callable[[Path], CoSupervisionModel],
    *,
    index: str | Path | None = None,
    corpus: str | None = None,
    seed: int = 0,
    allow_stale: bool = False,
    device: torch.device | str = "cpu",
) -> System:
    """The system that `--system` names.

    Args:
        name: as on the command line.
        checkpoint: the run or checkpoint whose Gen writes.
        load_model: loads one.
        index: for `co-supervised` and `pair`; by default the one beside the checkpoint that retrieves.
        corpus: the passages to search or to hand over; by default those of the index, or of the checkpoint's run.
        seed: of `random`, and of an untrained model.
        allow_stale: take an index that another checkpoint made.
        device: of an untrained model.

    Raises:
        ValueError: what `split_name` or the retriever refuses; an index or a corpus that this system does not read.
    """
    from cosup_fast.data.sources import load_corpus, resolve_checkpoint
    from cosup_fast.index.stores import load_index

    kind, argument = split_name(name)
    if index and kind.reads != "index":
        raise ValueError(f"--system {name} reads no index: leave out --index {index}")
    if index and corpus:
        raise ValueError(f"--index {index} holds its own passages: leave out --corpus {corpus}")
    model = _untrained(checkpoint, device) if kind.name == "untrained" else load_model(checkpoint)
    bench = Workbench(model, load=load_model, seed=seed)
    run = argument if kind.name == "pair" else ""
    sources = {"checkpoint": str(checkpoint)} | ({"retriever": run} if run else {})
    searched: Corpus | None = None
    if kind.reads == "index" and not corpus:
        index = index or (resolve_checkpoint(Path(run)) if run else checkpoint) / "index"
        loaded = load_index(index, bench.searcher(run), allow_stale=allow_stale)
        searched = Corpus.indexed(loaded, str(index))
        bench.add_index(run, searched, loaded)
        sources["index"] = str(index)
    elif kind.reads or corpus:
        corpus = corpus or corpus_of(checkpoint)
        searched = Corpus(load_corpus(corpus), corpus)
        sources["corpus"] = corpus
    return replace(bench.system(name, () if searched is None else searched), sources=sources)


def _untrained(checkpoint: Path, device: torch.device | str) -> CoSupervisionModel:
    """What the run of a checkpoint began as.

    Raises:
        ValueError: nothing says how it began.
    """
    from cosup_fast.training.initial import new_model

    run = config_of(checkpoint)
    if run is None:
        raise ValueError(f"--system untrained: {checkpoint} belongs to no run, whose config.yaml says how it began")
    return new_model(run, device).eval()


def output_folder(output: Path | None, checkpoint: Path, system: str) -> Path:
    """Where an evaluation is kept, by default `evaluation/SYSTEM` beside the checkpoint.

    Raises:
        ValueError: the folder holds something that is not an evaluation.
    """
    kind, argument = split_name(system)
    name = "-".join(filter(None, (kind.name, re.sub(r"[^\w.-]+", "-", Path(argument).name))))
    return check_replaceable(output or checkpoint / "evaluation" / name, EVALUATION)


def clear(folder: Path) -> None:
    """Removes an evaluation, and nothing else that may lie there.

    Raises:
        ValueError: another process is at it, or its answers are not those of an evaluation.
    """
    if not (folder / ANSWERS).exists():
        return
    with Journal(folder / ANSWERS, {"overwritten": True}, restart=True):
        for file in (VERDICTS, FLUENCY, REPORT, HTML, ANSWERS):
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
