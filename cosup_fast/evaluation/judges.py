"""Every judge of grounding by its name."""

from __future__ import annotations

import torch

from cosup_fast.evaluation.judge import Judge, LexicalJudge, NLIJudge
from cosup_fast.evaluation.likelihood import LikelihoodJudge
from cosup_fast.evaluation.metrics import require


def load_judge(name: str, *, device: torch.device | str = "cpu") -> Judge | None:
    """The judge called `lexical`, a `LikelihoodJudge` for `likelihood` or `likelihood:MODEL`, an `NLIJudge`, or none.

    Raises:
        ValueError: what `LikelihoodJudge` or `NLIJudge` refuses.
    """
    if name == "none":
        return None
    if name == "lexical":
        require("nltk.stem.porter", "nltk")
        return LexicalJudge()
    kind, _, model = name.partition(":")
    if kind == "likelihood":
        return LikelihoodJudge(model or "smollm2-135m", device=device)
    return NLIJudge(name, device=device)
