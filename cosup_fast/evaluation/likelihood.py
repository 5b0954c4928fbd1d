"""A judge of grounding that needs no NLI model: does a language model find the claim likelier after the passage?

    r = 1 - log p(claim | passage) / log p(claim)

r is the share of the claim's surprise that the passage removes: 1 where the passage says it all, 0 where it says
nothing of it, below 0 where the claim goes against it. It becomes a probability by a logistic curve that was fitted to
labels of VitaminC (`benchmarks/judges.py`; docs/evaluation.md says how well it separates them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cosup_fast.data.records import Passage
from cosup_fast.evaluation.judge import Verdict
from cosup_fast.evaluation.pretrained import load_pretrained
from cosup_fast.model.linear import linear

SLOPE, OFFSET = 3.71, -1.80
"""Of the logistic curve: p = 1 / (1 + exp(-(SLOPE r + OFFSET)))."""


class LikelihoodJudge:
    """A causal LM by prepared name, folder or Hugging Face name; the untrained Gen of a run is one.

    Args:
        name: which model.
        device: where it runs, in bf16; the head multiplies fp32.
        batch_size: pairs in one forward.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(self, name: str, *, device: torch.device | str = "cpu", batch_size: int = 16):
        from transformers import AutoModelForCausalLM

        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a forward needs at least one pair")
        self.name = f"likelihood:{name}"
        self._batch_size = batch_size
        self._model, self._tokenizer = load_pretrained(AutoModelForCausalLM, name, device, "judge")
        self._head = self._model.get_output_embeddings().weight.detach().float()
        self._model = self._model.to(torch.bfloat16)
        positions = self._model.config.get_text_config().max_position_embeddings
        self._max_length = min(positions, self._tokenizer.model_max_length)

    def judge(self, pairs: Sequence[tuple[Passage, str]]) -> list[Verdict]:
        """A verdict for each pair; the score is the probability that the passage entails the claim.

        Raises:
            ValueError: a claim that fills the model's positions by itself.
        """
        verdicts = []
        for removed in self.surprise_removed(pairs):
            logit = SLOPE * removed + OFFSET
            probability = (1 + math.tanh(logit / 2)) / 2  # of a claim that was certain alone, exp would overflow
            why = f"the passage removes {100 * removed:.0f}% of the claim's surprise"
            verdicts.append(Verdict(entailed=probability > 0.5, score=probability, why=why))
        return verdicts

    def surprise_removed(self, pairs: Sequence[tuple[Passage, str]]) -> list[float]:
        """r of each pair."""
        given = [(f"{p.title}: {p.text}\n\nClaim:" if p.title else f"{p.text}\n\nClaim:") for p, _ in pairs]
        claims = [f" {claim.strip()}" for _, claim in pairs]
        after = self._log_likelihoods(list(zip(given, claims, strict=True)))
        alone = self._log_likelihoods([("Claim:", claim) for claim in claims])
        # A claim that is certain by itself has no surprise to remove.
        return [1 - x / y if y < 0 else 0.0 for x, y in zip(after, alone, strict=True)]

    @torch.inference_mode()
    def _log_likelihoods(self, texts: Sequence[tuple[str, str]]) -> list[float]:
        """log p of each text after its context, which loses its head where both are too long."""
        rows = [self._tokens(context, text) for context, text in texts]
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
        for start in range(0, len(order), self._batch_size):
            members = order[start : start + self._batch_size]
            longest = sum(map(len, rows[members[-1]]))
            # Padding comes last, where a causal model does not see it.
            ids = torch.zeros(len(members), longest, dtype=torch.long)
            for row, i in enumerate(members):
                tokens = [*rows[i][0], *rows[i][1]]
                ids[row, : len(tokens)] = torch.tensor(tokens)
            ids = ids.to(self._model.device)
            hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for row, i in enumerate(members):
                before, after = map(len, rows[i])
                found[i] = self._log_likelihood(hidden[row, before - 1 : before + after - 1], rows[i][1])
        return found

    def _log_likelihood(self, hidden: Tensor, tokens: list[int]) -> float:
        logits = linear(hidden.float(), self._head)
        targets = torch.tensor(tokens, device=logits.device)
        return float(torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).sum())

    def _tokens(self, context: str, text: str) -> tuple[list[int], list[int]]:
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self._max_length - len(tokens)
        if room < 1:
            raise ValueError(
                f"the claim {text.strip()[:60]!r} leaves no room for its passage in the {self._max_length} positions "
                f"of judge {self.name!r}: choose another judge"
            )
        return self._tokenizer(context, verbose=False)["input_ids"][-room:], tokens
