"""What a run says of its models: which two, how much of them, what of them is trained, and the geometry of NSP."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cosup_fast.data.strict import Section

Attention = Literal["auto", "packed_sdpa", "flash_attention_2"]
Recompute = Literal["none", "full", "selective"]


class LoRAConfig(Section):
    """Adapters of one model; with rank 0 there are none, and all of its weights are trained."""

    rank: int = Field(
        default=0, ge=0, description="rank of the adapters A and B; 0: no adapters, all weights are trained"
    )
    alpha: float | None = Field(default=None, gt=0, description="B A is scaled by alpha / rank; null: twice the rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of A")
    targets: list[str] | None = Field(
        default=None,
        min_length=1,
        description="names of the layers that get adapters; null: every linear layer but the head",
    )
    quantize: Literal["nf4", "fp4"] | None = Field(
        default=None, description="keep the weights under the adapters in 4 bits (QLoRA), with bitsandbytes"
    )


class ModelConfig(Section):
    """Which two models, and how much of them."""

    init_from: str | None = Field(
        default=None,
        description="start from the models of this checkpoint, or of the best or newest one of this run: weights, "
        "projection, temperature and adapters, with a new optimizer; null: from gen and embseq",
    )
    gen: str = Field(default="smollm2-135m", description="Gen: a prepared name, a local folder or a Hugging Face name")
    embseq: str | None = Field(default=None, description="Embseq, named as Gen is; null: the same model as gen")
    shared: bool = Field(default=False, description="Embseq is Gen itself: one set of weights")
    freeze_embseq: bool = Field(default=False, description="Embseq's weights stay as they are")
    gen_layers: int | None = Field(default=None, ge=1, description="keep only the first layers of Gen")
    embseq_layers: int | None = Field(default=None, ge=1, description="keep only the first layers of Embseq")
    attention: Attention = Field(default="auto", description="auto: FlashAttention where it can run, else packed_sdpa")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(default="float32", description="dtype of the weights")
    gen_lora: LoRAConfig = Field(default=LoRAConfig(), description="train adapters of Gen instead of its weights")
    embseq_lora: LoRAConfig = Field(default=LoRAConfig(), description="adapters of Embseq")

    def alone(self) -> ModelConfig:
        """Gen without an Embseq."""
        without = {"embseq": None, "embseq_layers": None, "freeze_embseq": False, "embseq_lora": LoRAConfig()}
        return self.model_copy(update={**without, "shared": True})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shared and (self.embseq not in (None, self.gen) or self.embseq_layers not in (None, self.gen_layers)):
            raise ValueError(
                f"model.shared=true uses Gen as Embseq, so model.embseq={self.embseq!r} and "
                f"model.embseq_layers={self.embseq_layers} cannot differ from Gen's: leave them null"
            )
        if self.shared and self.freeze_embseq:
            raise ValueError(
                "model.shared=true with model.freeze_embseq=true would freeze Gen: set one of them to false"
            )
        for other in ("shared", "freeze_embseq"):
            if getattr(self, other) and self.embseq_lora.rank:
                raise ValueError(
                    f"model.{other}=true leaves Embseq no weights of its own to train, so model.embseq_lora.rank="
                    f"{self.embseq_lora.rank} has nothing to adapt: set rank=0"
                    + (", or adapt Gen with model.gen_lora.rank" if other == "shared" else f", or {other}=false")
                )
        for field in ("gen_lora", "embseq_lora"):
            lora: LoRAConfig = getattr(self, field)
            if lora.quantize and not lora.rank:
                raise ValueError(
                    f"model.{field}.quantize={lora.quantize} keeps weights in 4 bits, which cannot be trained, and "
                    f"model.{field}.rank=0 adds nothing that can: set a rank, such as 16, or quantize=null"
                )
            if lora.quantize and self.dtype == "float64":
                raise ValueError(
                    f"model.{field}.quantize={lora.quantize} has no products in model.dtype=float64: set "
                    "model.dtype=float32 or bfloat16"
                )
        if self.attention == "flash_attention_2" and self.dtype == "float64":
            raise ValueError("model.attention=flash_attention_2 takes 16-bit inputs, not model.dtype=float64")
        return self


class NTPConfig(Section):
    """The next-token-prediction loss: its weight in the sum."""

    weight: float = Field(
        default=1.0,
        ge=0,
        description="0: NSP alone, and Gen learns to ask, not to write; no logits are formed",
    )


class NSPConfig(Section):
    """The next-sequence-prediction loss: its weight in the sum and the geometry of its space."""

    weight: float = Field(
        default=1.0,
        ge=0,
        description="lambda: loss = ntp.weight * NTP + lambda * NSP; 0: NTP alone, and no Embseq is loaded",
    )
    initial_weight: float | None = Field(
        default=None, ge=0, description="lambda at the first step, which then moves to weight"
    )
    ramp: float | None = Field(
        default=None,
        gt=0,
        description="steps in which lambda moves from initial_weight to weight, in a straight line: below 1 a share of "
        "all, from 1 on their number",
    )
    similarity: Literal["dot", "cosine"] = Field(default="cosine", description="inner product, raw or of unit vectors")
    temperature: float = Field(
        default=0.05, gt=0, description="scores are divided by it (dot / sqrt(D): the root of D)"
    )
    learnable_temperature: bool = Field(
        default=False, description="train the temperature, starting from the value given"
    )
    symmetric: bool = Field(default=False, description="also contrast passages against queries")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _temperature_can_be_learnt(self) -> Self:
        if self.learnable_temperature and self.temperature < 0.01:
            raise ValueError(
                f"nsp.temperature={self.temperature} with nsp.learnable_temperature=true: one that is learnt stays at "
                "0.01 or above, as in CLIP; start there, or fix it with nsp.learnable_temperature=false"
            )
        return self

    @property
    def unit(self) -> bool:
        """Whether queries and sequence embeddings leave the model divided by their length."""
        return self.similarity == "cosine"

    @model_validator(mode="after")
    def _ramp_has_both_ends(self) -> Self:
        if (self.ramp is None) != (self.initial_weight is None):
            raise ValueError(
                f"nsp.initial_weight={self.initial_weight} with nsp.ramp={self.ramp}: lambda moves from the one in the "
                "steps of the other, so give both or neither"
            )
        if self.initial_weight is not None and self.weight == 0:
            raise ValueError(
                f"nsp.initial_weight={self.initial_weight} moves lambda to nsp.weight=0, where there is no Embseq: "
                "give a small nsp.weight, or omit nsp.initial_weight and nsp.ramp"
            )
        whole_steps("nsp.ramp", self.ramp)
        return self


def whole_steps(field: str, value: float | None) -> None:
    """Refuses a number of steps, as opposed to a share of them, that is not a whole number."""
    if value is not None and value >= 1 and value != int(value):
        raise ValueError(f"{field}={value} is neither a share of the steps, below 1, nor a whole number of steps")
