"""What a benchmark of the training step runs on: two models, passages, and examples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field

from cosup_fast.config.model import ModelConfig
from cosup_fast.data.records import Example, Passage
from cosup_fast.data.sources import load_corpus, load_examples
from cosup_fast.data.strict import Strict
from cosup_fast.data.template import TextConfig
from cosup_fast.model import CoSupervisionModel


class Loaded(NamedTuple):
    model: CoSupervisionModel  # in training mode
    corpus: dict[str, Passage]
    examples: list[Example]


class Material(Strict):
    """Which models and which data."""

    model: str = Field(default="smollm2-135m", description="the model that is Gen and Embseq")
    layers: int | None = Field(default=None, ge=1, description="keep so many of each model")
    corpus: str = Field(default="wiki-leads", description="passages")
    examples: list[str] = Field(default=["cloze/train", "questions/train"], description="sets of examples")
    passage_tokens: int = Field(default=512, ge=1, description="longest passage")
    checkpointing: bool = Field(default=True, description="activation checkpointing, as published")
    threads: int = Field(default=2, ge=1, description="threads of torch")

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
