"""What fields of different sections of a configuration rule out together: one function a topic, in one list.

A rule yields a message for each conflict; it names the fields, their values and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cosup_fast.config.sections import Sections
from cosup_fast.config.training import check_rounding

Rule = Callable[[Sections], Iterator[str]]


def something_is_trained(config: Sections) -> Iterator[str]:
    if config.ntp.weight == config.nsp.weight == 0:
        yield "ntp.weight=0 with nsp.weight=0 leaves no loss to train: raise one of them"


def without_embseq(config: Sections) -> Iterator[str]:
    """With nsp.weight=0 there is no Embseq that anything of its own could be asked of."""
    if config.has_embseq:
        return
    rank, best = config.model.embseq_lora.rank, config.training.keep_best
    if rank:
        yield (
            f"model.embseq_lora.rank={rank} makes adapters that learn nothing where nsp.weight=0: change one of them"
        )
    if config.nsp.learnable_temperature:
        yield "nsp.learnable_temperature=true learns nothing where nsp.weight=0: change one of them"
    if config.training.embseq_lr is not None:
        yield (
            f"training.embseq_lr={config.training.embseq_lr} has nothing to train where nsp.weight=0: change one of "
            "them"
        )
    if best not in (None, "ntp"):
        yield f"training.keep_best={best} is never there where nsp.weight=0, which has no Embseq: use ntp"


def learning_rates(config: Sections) -> Iterator[str]:
    training = config.training
    if training.embseq_lr is not None and config.model.shared:
        yield (
            f"training.embseq_lr={training.embseq_lr} has no weights of its own under model.shared=true: omit it, or "
            "set model.shared=false"
        )
    if training.temperature_lr is not None and not config.nsp.learnable_temperature:
        yield (
            f"training.temperature_lr={training.temperature_lr} has nothing to train: set "
            "nsp.learnable_temperature=true, or omit it"
        )


def held_out(config: Sections) -> Iterator[str]:
    if config.training.keep_best is not None and not config.data.dev:
        yield (
            f"training.keep_best={config.training.keep_best} needs held-out examples, and data.dev is empty: name some"
        )


def adapters(config: Sections) -> Iterator[str]:
    for field in ("gen_lora", "embseq_lora"):
        lora = getattr(config.model, field)
        for name in ("alpha", "dropout", "targets"):
            if (value := getattr(lora, name)) and not lora.rank:
                yield (
                    f"model.{field}.{name}={value} has no adapters to act on where model.{field}.rank=0: set a rank, "
                    "such as 16, or omit it"
                )


def in_4_bits(config: Sections) -> Iterator[str]:
    for field in ("gen_lora", "embseq_lora"):
        if getattr(config.model, field).quantize is None:
            continue
        if config.training.compile:
            yield f"training.compile=true does not reach into 4-bit weights, model.{field}.quantize: change one of them"
        if config.training.sharding == "fsdp":
            yield (
                f"training.sharding=fsdp cannot share out 4-bit weights, model.{field}.quantize: use "
                "training.sharding=ddp, or quantize=null"
            )


def precision(config: Sections) -> Iterator[str]:
    model, training = config.model, config.training
    if model.dtype == "float64" and training.precision == "bfloat16":
        yield "training.precision=bfloat16 casts nothing where model.dtype=float64: set one of them to float32"
    if model.attention == "flash_attention_2" and model.dtype == training.precision == "float32":
        yield (
            "model.attention=flash_attention_2 takes 16-bit inputs, and training.precision=float32 with "
            "model.dtype=float32 gives none: set training.precision=bfloat16, or model.attention=auto"
        )
    if model.attention == "flash_attention_2" and training.device.startswith("cpu"):
        yield (
            f"model.attention=flash_attention_2 runs on CUDA alone, not on training.device={training.device}: "
            "set model.attention=auto"
        )


def optimizer(config: Sections) -> Iterator[str]:
    model, training = config.model, config.training
    if model.dtype == "float64" and training.optimizer != "adamw":
        yield f"training.optimizer={training.optimizer} steps no weights of model.dtype=float64: use adamw"
    if training.optimizer_in_backward and model.shared and config.has_embseq:
        yield (
            "training.optimizer_in_backward=true steps after one backward pass, and model.shared=true has two, as "
            "Embseq and as Gen: set one of them to false"
        )
    check_rounding(training.optimizer, rounded=config.rounds)


RULES: tuple[Rule, ...] = (
    something_is_trained,
    without_embseq,
    learning_rates,
    held_out,
    adapters,
    in_4_bits,
    precision,
    optimizer,
)
