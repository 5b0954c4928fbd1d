"""The judge by likelihood: its ratio against log probabilities of transformers, one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cosup_fast.data.records import Passage
from cosup_fast.evaluation import LikelihoodJudge, load_judge
from cosup_fast.evaluation.likelihood import OFFSET, SLOPE

PAIRS = [
    (Passage(id="p", title="Paris", text="Paris is the capital of France."), "Paris is the capital."),
    (Passage(id="r", title="", text="Rome was founded in 753 BC. " * 4), " Rome is old "),
    (Passage(id="s", title="Seine", text="x"), "The Seine is a river of 777 km in northern France."),
]


def alone(folder: str, context: str, text: str) -> float:
    """log p of a text after its context, in bf16 as the judge has it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    before, after = tokenizer(context)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1].float()
    return float(torch.log_softmax(logits, -1)[range(len(after)), after].sum())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_share_of_surprise_that_a_passage_removes(llama_folder, batch_size):
    judge = LikelihoodJudge(llama_folder, batch_size=batch_size)
    verdicts = judge.judge(PAIRS)
    for (passage, claim), removed, verdict in zip(PAIRS, judge.surprise_removed(PAIRS), verdicts, strict=True):
        given = f"{passage.title}: {passage.text}" if passage.title else passage.text
        with_it = alone(llama_folder, f"{given}\n\nClaim:", f" {claim.strip()}")
        without = alone(llama_folder, "Claim:", f" {claim.strip()}")
        assert removed == pytest.approx(1 - with_it / without, abs=0.02)
        assert verdict.score == pytest.approx(1 / (1 + math.exp(-(SLOPE * removed + OFFSET))))
        assert verdict.entailed == (verdict.score > 0.5)
        assert "surprise" in verdict.why


def test_a_claim_that_the_passage_makes_much_less_likely_has_a_verdict(llama_folder, monkeypatch):
    judge = LikelihoodJudge(llama_folder)
    monkeypatch.setattr(judge, "surprise_removed", lambda pairs: [-1e6, 1e6])
    assert [verdict.score for verdict in judge.judge(PAIRS[:2])] == [0, 1]


def test_a_long_passage_loses_its_head_and_a_long_claim_is_refused(llama_folder):
    judge = load_judge(f"likelihood:{llama_folder}")
    assert isinstance(judge, LikelihoodJudge)
    assert judge.name == f"likelihood:{llama_folder}"
    long = Passage(id="l", title="", text="word " * 2000)
    assert len(judge.judge([(long, "a claim")])) == 1
    with pytest.raises(ValueError, match=r"the claim .word .* leaves no room for its passage in the 512 positions"):
        judge.judge([(long, "word " * 2000)])
    with pytest.raises(ValueError, match="batch_size=0"):
        LikelihoodJudge(llama_folder, batch_size=0)
    with pytest.raises(ValueError, match=r"nowhere"):
        load_judge("likelihood:/nowhere")
