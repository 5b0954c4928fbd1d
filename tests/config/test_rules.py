"""Fields that rule each other out: every rule of the list refuses what it is there for, and names fields and values."""

import pytest

from cosup_fast.config import ConfigError, RunConfig, load_config
from cosup_fast.config.rules import RULES

# Each line is one conflict: settings and fields that the message names | what else is set.
REFUSED = {
    "something_is_trained": ["ntp.weight=0 nsp.weight=0"],
    "without_embseq": [
        "nsp.weight=0 model.embseq_lora.rank=4",
        "nsp.weight=0 nsp.learnable_temperature=true",
        "nsp.weight=0 training.embseq_lr=1e-05",
        "nsp.weight=0 training.keep_best=recall_at_5",
    ],
    "learning_rates": [
        "training.embseq_lr=0.001 model.shared=true",
        "training.temperature_lr=0.001 nsp.learnable_temperature",
    ],
    "held_out": ["training.keep_best=ntp data.dev | data.dev=[]"],
    "adapters": [
        "model.gen_lora.alpha=8 model.gen_lora.rank=0",
        "model.gen_lora.quantize=nf4 model.gen_lora.rank=0",
        "model.embseq_lora.dropout=0.1 model.embseq_lora.rank=0",
        "model.embseq_lora.targets=['q_proj'] model.embseq_lora.rank=0",
    ],
    "in_4_bits": [
        "model.gen_lora.quantize training.compile=true | model.gen_lora.rank=4 model.gen_lora.quantize=nf4",
        "model.embseq_lora.quantize training.sharding=fsdp | model.embseq_lora.rank=4 model.embseq_lora.quantize=nf4",
    ],
    "precision": [
        "model.dtype=float64 training.precision=bfloat16",
        "model.attention=flash_attention_2 training.precision=float32",
        "model.attention=flash_attention_2 training.device=cpu | training.precision=bfloat16",
    ],
    "optimizer": [
        "model.dtype=float64 training.optimizer=adamw-8bit",
        "model.dtype=bfloat16 training.optimizer=adamw-8bit",
        "model.shared=true training.optimizer_in_backward=true | training.clip=null training.spike_factor=null "
        "training.diagnose_every=null training.sharding=none",
    ],
}
# The same of fields of one section, which the section itself refuses.
IN_A_SECTION = [
    "model.shared=true model.embseq_lora.rank=4",
    "model.freeze_embseq=true model.embseq_lora | model.embseq_lora.rank=4",
    "model.embseq_lora.quantize=nf4 model.dtype=float64 | model.embseq_lora.rank=4",
    "nsp.initial_weight nsp.ramp=0.1",
    "nsp.initial_weight=0.1 nsp.ramp",
    "nsp.initial_weight=1.0 nsp.weight=0 | nsp.ramp=3",
    "nsp.ramp=2.5 whole | nsp.initial_weight=1",
    "training.compile=true training.activation_checkpointing=selective",
    "training.fixed_shapes=true training.tokens_per_micro_batch",
    "training.patience=2 training.keep_best",
    "training.keep_best=ntp training.eval_every=null",
    "training.min_lr=0.1 training.schedule=constant",
    "training.warmup=2.5 whole",
]


def test_every_rule_is_tried():
    assert list(REFUSED) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("conflict", [*(line for lines in REFUSED.values() for line in lines), *IN_A_SECTION])
def test_what_rules_each_other_out_is_refused_and_named(conflict):
    named, _, more = conflict.partition(" | ")
    settings = [word for word in named.split() if "=" in word]
    with pytest.raises(ConfigError) as refused:
        load_config(None, [*settings, *more.split()])
    for word in named.split():
        assert word in str(refused.value)


def test_the_defaults_break_no_rule():
    assert not [message for rule in RULES for message in rule(RunConfig())]
