"""Evaluation: systems answer questions; retrieval, correctness, grounding and fluency are measured, with intervals.

`suites` and `metrics` say what is measured, `kinds` and `systems` what is evaluated, `workbench` keeps what many
evaluations share, `run` does it, `report` and `html` show it, `comparison` sets two runs side by side. Names are
imported on first use: the command line reads `kinds` alone for its help. Source: Lee et al. 2024, arXiv 2403.09024,
section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosup_fast.lazy import attach

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

__getattr__, __dir__ = attach(
    __name__,
    {
        "comparison": ("compare",),
        "corpus": ("Corpus",),
        "estimates": ("Estimate", "bootstrap_mean", "paired_gain"),
        "fluency": ("FluencyModel",),
        "inputs": ("TestSet", "load_test_sets"),
        "judge": ("Judge", "LexicalJudge", "NLIJudge", "Verdict"),
        "judges": ("load_judge",),
        "kinds": ("SYSTEMS",),
        "likelihood": ("LikelihoodJudge",),
        "ranks": ("retrieval_ranks",),
        "report": ("QuestionRecord", "Report"),
        "retrievers": ("GoldRetriever", "IndexRetriever", "PairRetriever", "RandomRetriever"),
        "run": ("evaluate",),
        "systems": ("System",),
        "text_retrievers": ("BM25Retriever", "DenseRetriever"),
        "workbench": ("Workbench",),
    },
)
