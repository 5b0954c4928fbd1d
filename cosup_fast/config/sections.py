"""The sections of a run's configuration, each of which is checked alone; `rules.py` has what they rule out together."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cosup_fast.config.generation import GenerationConfig
from cosup_fast.config.model import ModelConfig, NSPConfig, NTPConfig
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.strict import Section
from cosup_fast.data.template import TextConfig

Weight = Annotated[float, Field(gt=0)]


class DataConfig(Section):
    """What is trained on and what is held out. Each name is a prepared set, a JSONL file, `hf:owner/name:split`, or
    published data in their own form, such as `tevatron:train.jsonl` (docs/data.md)."""

    corpus: str = Field(default="wiki-leads", description="the passages")
    checksum: bool = Field(
        default=False,
        description="compare a corpus file with the SHA-256 it had when it was first read; otherwise size and time",
    )
    train: list[str] = Field(default=["cloze/train", "questions/train"], description="example sets that are trained on")
    weights: list[Weight] | None = Field(
        default=None,
        description="how much of an epoch each set of data.train makes up, relative to the others; null: every example "
        "comes once",
    )
    negatives: int | None = Field(
        default=None,
        ge=0,
        description="hard negatives of an example that a step reads, drawn again for every step; null: all of them",
    )
    long_examples: Literal["error", "skip"] = Field(
        default="error",
        description="what becomes of an example that is longer than a micro-batch or than the model's positions, or "
        "that has such a passage: skip leaves it out and says how many there are",
    )
    dev: list[str] = Field(default=["questions/dev"], description="held-out example sets, evaluated while training")
    train_limit: int | None = Field(
        default=None, ge=1, description="use only so many training examples, drawn by the seed"
    )
    dev_limit: int | None = Field(
        default=200, ge=1, description="use only so many held-out examples, the same for every seed"
    )
    dev_pool: int = Field(
        default=800, ge=1, description="passages searched for held-out retrieval: the gold ones and others"
    )
    allow_no_retrieval: bool = Field(default=False, description="accept training examples without any retrieval")
    allow_leaks: bool = Field(
        default=False, description="accept held-out examples whose id, question or gold passage is trained on"
    )

    @model_validator(mode="after")
    def _a_weight_for_each_set(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(
                f"data.weights={self.weights} has {len(self.weights)} entries for the {len(self.train)} sets of "
                "data.train: give each set one"
            )
        return self


class Sections(Section):
    """Everything that decides a run."""

    output: str = Field(
        default="runs/cosup", description="folder for checkpoints, metrics, plots and this configuration"
    )
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    ntp: NTPConfig = NTPConfig()
    nsp: NSPConfig = NSPConfig()
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig = GenerationConfig()

    @property
    def models(self) -> ModelConfig:
        """What of `model` is loaded: with nsp.weight=0 Gen alone."""
        return self.model if self.has_embseq else self.model.alone()

    @property
    def has_embseq(self) -> bool:
        """Whether there is a second model, or a second use of the first one, that embeds passages."""
        return self.nsp.weight > 0

    @property
    def rounds(self) -> bool:
        """Whether trained weights are in bf16; adapters never are."""
        model = self.model
        adapters_alone = model.gen_lora.rank and (
            model.embseq_lora.rank or model.shared or model.freeze_embseq or not self.has_embseq
        )
        return model.dtype == "bfloat16" and not adapters_alone
