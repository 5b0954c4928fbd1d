"""What a benchmark of the training step runs on: two models, passages, and examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from cosup_fast.config.model import ModelConfig
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sources import load_corpus, load_examples
from cosup_fast.data.template import TextConfig
from cosup_fast.model import CoSupervisionModel


class Loaded(NamedTuple):
    model: CoSupervisionModel  # in training mode
    corpus: dict[str, Passage]
    examples: list[Example]


@dataclass(frozen=True)
class Material:
    """Which models and which data."""

    model: str = "smollm2-135m"
    layers: int | None = None
    corpus: str = "wiki-leads"
    examples: tuple[str, ...] = ("cloze/train", "questions/train")
    passage_tokens: int = 512
    checkpointing: bool = True  # as published
    threads: int = 2

    def load(self) -> Loaded:
        """Reads them, and sets torch's threads."""
        torch.set_num_threads(self.threads)
        parts = ModelConfig(gen=self.model, gen_layers=self.layers, embseq_layers=self.layers)
        text = TextConfig(max_passage_tokens=self.passage_tokens, long_passages="truncate")
        model = CoSupervisionModel.from_pretrained(parts, text)
        if self.checkpointing:
            model.enable_activation_checkpointing()
        corpus = {passage.id: passage for passage in load_corpus(self.corpus)}
        examples = [example for name in self.examples for example in load_examples(name, corpus)]
        return Loaded(model.train(), corpus, examples)
