"""Evaluation: systems answer questions; retrieval, correctness, grounding and fluency are measured, with intervals.

`suites` and `metrics` say what is measured, `kinds` and `systems` what is evaluated, `workbench` keeps what many
evaluations share, `run` does it, `report` and `html` show it, `comparison` sets two runs side by side. Names are
imported on first use: the command line reads `kinds` alone for its help. Source: Lee et al. 2024, arXiv 2403.09024,
section 4.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosup_fast.evaluation.comparison import compare
    from cosup_fast.evaluation.corpus import Corpus
    from cosup_fast.evaluation.estimates import Estimate, bootstrap_mean, paired_gain
    from cosup_fast.evaluation.fluency import FluencyModel
    from cosup_fast.evaluation.inputs import TestSet, load_test_sets
    from cosup_fast.evaluation.judge import Judge, LexicalJudge, NLIJudge, Verdict
    from cosup_fast.evaluation.judges import load_judge
    from cosup_fast.evaluation.kinds import SYSTEMS
    from cosup_fast.evaluation.likelihood import LikelihoodJudge
    from cosup_fast.evaluation.ranks import retrieval_ranks
    from cosup_fast.evaluation.report import QuestionRecord, Report
    from cosup_fast.evaluation.retrievers import GoldRetriever, IndexRetriever, PairRetriever, RandomRetriever
    from cosup_fast.evaluation.run import evaluate
    from cosup_fast.evaluation.systems import System
    from cosup_fast.evaluation.text_retrievers import BM25Retriever, DenseRetriever
    from cosup_fast.evaluation.workbench import Workbench

_HOME = {
    "SYSTEMS": "kinds",
    "BM25Retriever": "text_retrievers",
    "Corpus": "corpus",
    "DenseRetriever": "text_retrievers",
    "Estimate": "estimates",
    "FluencyModel": "fluency",
    "GoldRetriever": "retrievers",
    "IndexRetriever": "retrievers",
    "Judge": "judge",
    "LexicalJudge": "judge",
    "LikelihoodJudge": "likelihood",
    "NLIJudge": "judge",
    "PairRetriever": "retrievers",
    "QuestionRecord": "report",
    "RandomRetriever": "retrievers",
    "Report": "report",
    "System": "systems",
    "TestSet": "inputs",
    "Verdict": "judge",
    "Workbench": "workbench",
    "bootstrap_mean": "estimates",
    "compare": "comparison",
    "evaluate": "run",
    "load_judge": "judges",
    "load_test_sets": "inputs",
    "paired_gain": "estimates",
    "retrieval_ranks": "ranks",
}

__all__ = [
    "SYSTEMS",
    "BM25Retriever",
    "Corpus",
    "DenseRetriever",
    "Estimate",
    "FluencyModel",
    "GoldRetriever",
    "IndexRetriever",
    "Judge",
    "LexicalJudge",
    "LikelihoodJudge",
    "NLIJudge",
    "PairRetriever",
    "QuestionRecord",
    "RandomRetriever",
    "Report",
    "System",
    "TestSet",
    "Verdict",
    "Workbench",
    "bootstrap_mean",
    "compare",
    "evaluate",
    "load_judge",
    "load_test_sets",
    "paired_gain",
    "retrieval_ranks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
