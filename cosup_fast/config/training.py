"""The settings of an optimisation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cosup_fast.config.model import Recompute, whole_steps
from cosup_fast.data.packing import PackLimits
from cosup_fast.data.strict import Section

Share = Annotated[float, Field(ge=0, lt=1)]


BestMetric = Literal["ntp", "nsp", "recall_at_1", "recall_at_5", "recall_at_20"]
OptimizerName = Literal["adamw", "adamw-8bit", "adamw-8bit-torchao"]
Sharding = Literal["none", "ddp", "fsdp"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


class TrainingConfig(Section):
    """The optimisation."""

    epochs: int = Field(default=3, ge=1, description="passes over the training set, unless steps is given")
    steps: int | None = Field(default=None, ge=1, description="stop after so many steps, whatever the epochs")
    max_minutes: float | None = Field(default=None, gt=0, description="stop after so many minutes, with a checkpoint")
    batch_size: int = Field(default=32, ge=1, description="examples of a step: all their passages are its negatives")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="most sequences in one forward of a model, for memory; null: all of the step"
    )
    tokens_per_micro_batch: int | None = Field(
        default=None, ge=1, description="most tokens in one forward of a model, for memory; null: all of the step"
    )
    fixed_shapes: bool = Field(
        default=False, description="fill every micro-batch up to tokens_per_micro_batch, so that no shape ever changes"
    )
    balance_lengths: bool = Field(
        default=True, description="give every step short and long examples alike; false: a plain permutation"
    )
    lr: float = Field(
        default=2e-5,
        gt=0,
        description="learning rate of Gen and, unless they have their own, of Embseq and of the temperature",
    )
    embseq_lr: float | None = Field(
        default=None, gt=0, description="learning rate of Embseq and its projection; null: lr"
    )
    temperature_lr: float | None = Field(
        default=None, gt=0, description="learning rate of a learnable temperature; null: lr"
    )
    warmup: float = Field(
        default=0.03,
        ge=0,
        description="steps with a rising learning rate: below 1 a share of all, from 1 on their number",
    )
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_lr: float = Field(
        default=0.0, ge=0, lt=1, description="what the learning rates do not fall below, as a share of them"
    )
    lr_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the learning rate after each epoch (paper: 0.85)"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay of matrices; norms, biases and scales have none"
    )
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip: float | None = Field(
        default=1.0, gt=0, description="global gradient norm over both models; null: no clipping"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast, weights stay as is"
    )
    activation_checkpointing: Recompute = Field(
        default="none", description="computed again in the backward pass, for memory: selective keeps all products"
    )
    compile: bool = Field(default=False, description="torch.compile for every decoder layer")
    sharding: Sharding = Field(
        default="ddp",
        description="how torchrun's ranks share the work. fsdp: weights, gradients and optimizer states are sharded; "
        "ddp: each rank has all of them; none: there is one process. One process is the same with each",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        description="with sharding=fsdp, whole copies of the weights, each shared out over ranks / replicas: hybrid "
        "sharding, for which the copies are usually the nodes",
    )
    optimizer: OptimizerName = Field(
        default="adamw", description="adamw-8bit: states of bitsandbytes; adamw-8bit-torchao: of torchao"
    )
    optimizer_in_backward: bool = Field(
        default=False, description="step each weight in the backward pass and keep no gradients; one GPU, one pack"
    )
    key_grad: Literal["global", "local"] = Field(
        default="global",
        description="under torchrun, whose queries a passage learns from: those of all ranks, or of its own alone",
    )
    rank_timeout: float = Field(
        default=600.0, gt=0, description="seconds that ranks wait for one another, also while one saves a checkpoint"
    )
    seed: int = 0
    report_to: list[Tracker] = Field(
        default=["tensorboard"],
        description="experiment trackers that are sent every figure; metrics.jsonl has them in any case",
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="what a device could do, in TFLOP/s, for the model FLOP utilisation; null: by its data sheet where "
        "products are in bf16 and the device is known, otherwise none is reported",
    )
    log_every: int = Field(default=1, ge=1, description="steps between metrics")
    diagnose_every: int | None = Field(
        default=100,
        ge=1,
        description="steps between looks at the gradients of each loss, each as expensive as a step; null: never",
    )
    spike_factor: float | None = Field(
        default=20.0,
        gt=0,
        description="stop before a step whose loss is so many robust standard deviations above the median; null: never",
    )
    spike_window: int = Field(default=100, ge=4, description="steps that the median of spike_factor is taken over")
    on_spike: Literal["stop", "skip"] = Field(
        default="stop",
        description="what such a step does, or one whose loss or gradient is not finite: stop ends the run with the "
        "step undone, skip passes over its batch",
    )
    max_skips: int = Field(default=3, ge=1, description="most steps in a row that on_spike=skip passes over")
    eval_every: int | None = Field(default=100, ge=1, description="steps between held-out evaluations; null: never")
    checkpoint_every: int | None = Field(
        default=500, ge=1, description="steps between checkpoints; null: only at the end"
    )
    checkpoint_minutes: float | None = Field(
        default=15.0, gt=0, description="also save when so many minutes have passed without; null: never"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="checkpoints that stay, the newest ones")
    keep_best: BestMetric | None = Field(
        default=None,
        description="also keep the checkpoint with the best held-out value of this figure, which is then meant by the "
        "run's folder: the lowest loss, the highest recall",
    )
    patience: int | None = Field(
        default=None, ge=1, description="end the run after so many evaluations without a better keep_best; null: never"
    )
    device: str = Field(default="auto", description="auto: cuda when there is one, else cpu")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.fixed_shapes and self.tokens_per_micro_batch is None:
            raise ValueError(
                "training.fixed_shapes=true needs a size to fill micro-batches up to: set "
                "training.tokens_per_micro_batch, now null"
            )
        if self.compile and self.activation_checkpointing != "none":
            raise ValueError(
                f"training.compile=true has no effect under training.activation_checkpointing="
                f"{self.activation_checkpointing}, which runs its layers uncompiled: change one of them"
            )
        whole_steps("training.warmup", self.warmup)
        if self.min_lr and self.schedule == "constant" and self.lr_decay == 1:
            raise ValueError(
                f"training.min_lr={self.min_lr} is a floor for nothing under training.schedule=constant with "
                "training.lr_decay=1: set training.schedule=linear or cosine, or omit it"
            )
        if self.patience is not None and self.keep_best is None:
            raise ValueError(
                f"training.patience={self.patience} waits for nothing: say in training.keep_best which figure is to "
                "become better, such as recall_at_5"
            )
        if self.keep_best is not None and self.eval_every is None:
            raise ValueError(
                f"training.keep_best={self.keep_best} is never evaluated under training.eval_every=null: set that to "
                "a number of steps"
            )
        if twice := next((name for name in self.report_to if self.report_to.count(name) > 1), None):
            raise ValueError(f"training.report_to names {twice} more than once: name it once")
        if self.replicas > 1 and self.sharding != "fsdp":
            raise ValueError(
                f"training.replicas={self.replicas} copies shards, and training.sharding={self.sharding} has none: set "
                "training.sharding=fsdp, or omit replicas"
            )
        for wrong, field in (
            (self.clip is not None, f"training.clip={self.clip}, which needs all gradients at once: set it to null"),
            (
                self.tokens_per_micro_batch is not None or self.micro_batch_size is not None,
                f"training.tokens_per_micro_batch={self.tokens_per_micro_batch} and training.micro_batch_size="
                f"{self.micro_batch_size}, which add gradients up over packs: set both to null",
            ),
            (self.sharding == "fsdp", "training.sharding=fsdp, which sums gradients over ranks first: use none"),
            (
                self.spike_factor is not None,
                f"training.spike_factor={self.spike_factor}, which refuses a step before it is taken: set it to null",
            ),
            (
                self.diagnose_every is not None,
                f"training.diagnose_every={self.diagnose_every}, which runs backward passes that must not step: set it "
                "to null",
            ),
            (
                self.on_spike == "skip",
                "training.on_spike=skip, which decides on a step before it is taken: set it to stop",
            ),
        ):
            if self.optimizer_in_backward and wrong:
                raise ValueError(f"training.optimizer_in_backward=true cannot be combined with {field}")
        return self

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates other than `lr`, by the module of the model whose parameters have them."""
        own = {"embseq": self.embseq_lr, "projection": self.embseq_lr, "criterion": self.temperature_lr}
        return {part: rate for part, rate in own.items() if rate is not None}

    @property
    def pack_limits(self) -> PackLimits:
        """What goes into a micro-batch."""
        return PackLimits(self.tokens_per_micro_batch, self.micro_batch_size, self.fixed_shapes)


def check_rounding(name: str, *, rounded: bool) -> None:
    """Refuses an optimizer that loses its steps in bf16 weights (`rounded`).

    Raises:
        ValueError: naming the fields and the remedy.
    """
    if name == "adamw-8bit" and rounded:
        raise ValueError(
            "training.optimizer=adamw-8bit rounds steps to the nearest weight, and with model.dtype=bfloat16 most of "
            "them are lost: use adamw-8bit-torchao, which rounds stochastically, or model.dtype=float32"
        )
