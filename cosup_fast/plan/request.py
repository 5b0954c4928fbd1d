"""What is planned: two models by their configurations, the packs of a step on each GPU, and how the step is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from cosup_fast.config.model import LoRAConfig, Recompute
from cosup_fast.config.training import OptimizerName, Sharding
from cosup_fast.plan.configs import decoder, model_config

if TYPE_CHECKING:
    from cosup_fast.config import RunConfig


class PlanRequest(BaseModel):
    """A run, as far as memory and time depend on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gen: dict[str, Any]
    embseq: dict[str, Any] | None = None
    shared: bool = False
    freeze_embseq: bool = False
    new_tokens: int = 4
    gen_lora: LoRAConfig = LoRAConfig()
    embseq_lora: LoRAConfig = LoRAConfig()
    nsp_weight: float = Field(default=1.0, ge=0)
    ntp_weight: float = Field(default=1.0, ge=0)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    activation_checkpointing: Recompute = "full"
    optimizer: OptimizerName = "adamw"
    optimizer_in_backward: bool = False
    clip: bool = True
    sharding: Sharding = "fsdp"
    key_grad: Literal["global", "local"] = "global"
    gpus: int = Field(default=8, ge=1)
    replicas: int = Field(default=1, ge=1, description="whole copies of the sharded weights (hybrid sharding)")
    device: str = "cuda"
    gen_sequences: int = Field(default=4, ge=1, description="sequences of a pack of Gen's")
    gen_length: int = Field(default=1024, ge=1)
    gen_packs: int = Field(default=1, ge=1, description="packs of a step on each GPU")
    queries_per_sequence: int = Field(default=4, ge=0)
    embseq_sequences: int = Field(default=16, ge=1)
    embseq_length: int = Field(default=256, ge=1)
    embseq_packs: int = Field(default=1, ge=1)

    @property
    def has_embseq(self) -> bool:
        """Whether passages are embedded, by a second model or by Gen."""
        return self.nsp_weight > 0

    @property
    def projects(self) -> bool:
        """Whether a learned projection takes embeddings of passages to the width of Gen."""
        return self.embseq is not None and decoder(self.embseq).hidden_size != decoder(self.gen).hidden_size

    @classmethod
    def of(cls, config: RunConfig, *, gpus: int, replicas: int | None = None, **packs: Any) -> Self:
        """The request of a run on so many GPUs.

        Args:
            config: the run; its models are looked up by `model_config`.
            gpus: processes, each with one; with training.sharding=none just one.
            replicas: instead of training.replicas.
            packs: the fields above that say how large packs are and how many a step has.

        Raises:
            ValueError: a model that is not known; more than one GPU for a run of one process; replicas that do not
                divide the GPUs, or without sharding.
        """
        model, training = config.model, config.training
        if training.sharding == "none" and gpus > 1:
            raise ValueError(
                f"training.sharding=none is a run on one GPU, not on {gpus}: use training.sharding=fsdp (or ddp)"
            )
        if training.optimizer_in_backward and gpus > 1:
            raise ValueError(f"training.optimizer_in_backward=true is a run on one GPU, not on {gpus}: set it to false")
        replicas = training.replicas if replicas is None else replicas
        if replicas > 1 and training.sharding != "fsdp":
            raise ValueError(
                f"replicas is {replicas} and training.sharding={training.sharding}: only training.sharding=fsdp has "
                "shards to replicate"
            )
        if gpus % replicas:
            raise ValueError(f"replicas is {replicas}, which does not divide {gpus} GPUs; choose a divisor")
        second = config.has_embseq and not model.shared
        return cls(
            gen=model_config(model.gen, model.gen_layers),
            embseq=model_config(model.embseq or model.gen, model.embseq_layers) if second else None,
            gpus=gpus,
            replicas=replicas,
            **{name: getattr(model, name) for name in _OF_MODEL},
            **{name: getattr(training, name) for name in _OF_TRAINING},
            nsp_weight=config.nsp.weight,
            ntp_weight=config.ntp.weight,
            clip=training.clip is not None,
            **packs,
        )


_OF_MODEL = ("shared", "freeze_embseq", "gen_lora", "embseq_lora", "dtype")
_OF_TRAINING = ("precision", "activation_checkpointing", "optimizer", "optimizer_in_backward", "sharding", "key_grad")
