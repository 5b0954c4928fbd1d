"""Fluency: how likely a language model finds the text that Gen wrote.

    perplexity = exp(mean over texts of (1/T) sum_t -log p(w_t | w_<t))

over the T tokens of a text that have a token before them; a tokenizer that starts texts with a token of its own makes
that all of them. Inserted passages are not part of the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cosup_fast.evaluation.pretrained import load_pretrained


class FluencyModel:
    """A causal LM by prepared name, folder or Hugging Face name.

    Args:
        name: which model.
        device: where it runs.
        batch_size: texts in one forward.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(self, name: str, *, device: torch.device | str = "cpu", batch_size: int = 8):
        from transformers import AutoModelForCausalLM

        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a forward needs at least one text")
        self.name = name
        self._batch_size = batch_size
        self._model, self._tokenizer = load_pretrained(AutoModelForCausalLM, name, device, "fluency model")
        positions = self._model.config.get_text_config().max_position_embeddings
        self._max_length = min(positions, self._tokenizer.model_max_length)

    @torch.inference_mode()
    def nats_per_token(self, texts: Sequence[str]) -> list[float | None]:
        """The mean of -log p of each text's tokens; None for a text with fewer than two tokens.

        A text beyond the model's positions is cut there.
        """
        tokens = [self._tokenizer(text)["input_ids"][: self._max_length] for text in texts]
        found: list[float | None] = [None] * len(texts)
        order = sorted((i for i in range(len(texts)) if len(tokens[i]) > 1), key=lambda i: len(tokens[i]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            longest = len(tokens[rows[-1]])
            # Padding is on the right, where a causal model does not see it.
            ids = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in rows])
            mask = torch.tensor([[1] * len(tokens[i]) + [0] * (longest - len(tokens[i])) for i in rows])
            ids, mask = ids.to(self._model.device), mask.to(self._model.device)
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            losses = nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none") * mask[:, 1:]
            for i, loss, count in zip(rows, losses.sum(dim=1), mask[:, 1:].sum(dim=1), strict=True):
                found[i] = float(loss / count)
        return found
