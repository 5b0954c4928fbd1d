"""Evaluation: systems answer questions; retrieval, correctness, grounding and fluency are measured, with intervals.

`suites` and `metrics` say what is measured, `systems` what is evaluated, `workbench` keeps what many evaluations share,
`run` does it, `report` and `html` show it, `compare` sets two runs side by side. Source: Lee et al. 2024, arXiv
2403.09024, section 4.
"""

from cosup_fast.evaluation.compare import compare
from cosup_fast.evaluation.corpus import Corpus
from cosup_fast.evaluation.estimates import Estimate, bootstrap_mean, paired_gain
from cosup_fast.evaluation.fluency import FluencyModel
from cosup_fast.evaluation.inputs import TestSet, load_test_sets
from cosup_fast.evaluation.judge import Judge, LexicalJudge, NLIJudge, Verdict, load_judge
from cosup_fast.evaluation.ranks import retrieval_ranks
from cosup_fast.evaluation.report import QuestionRecord, Report
from cosup_fast.evaluation.retrievers import GoldRetriever, IndexRetriever, PairRetriever, RandomRetriever
from cosup_fast.evaluation.run import evaluate
from cosup_fast.evaluation.systems import SYSTEMS, System
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
