"""Fields that rule each other out: every rule of the list refuses what it is there for, and names the fields."""

import pytest

from cosup_fast.config import ConfigError, RunConfig, load_config
from cosup_fast.config.rules import RULES

# By rule: settings that only this rule refuses, one line for each of its messages.
REFUSED = {
    "something_is_trained": ["ntp.weight=0 nsp.weight=0"],
    "without_embseq": [
        "nsp.weight=0 model.embseq_lora.rank=4",
        "nsp.weight=0 nsp.learnable_temperature=true",
        "nsp.weight=0 training.embseq_lr=1e-5",
        "nsp.weight=0 training.keep_best=recall_at_5",
    ],
    "learning_rates": ["model.shared=true training.embseq_lr=1e-5", "training.temperature_lr=1e-3"],
    "held_out": ["training.keep_best=ntp data.dev=[]"],
    "adapters": ["model.gen_lora.alpha=8", "model.embseq_lora.targets=[q_proj]"],
    "in_4_bits": [
        "model.gen_lora.rank=4 model.gen_lora.quantize=nf4 training.compile=true",
        "model.embseq_lora.rank=4 model.embseq_lora.quantize=nf4 training.sharding=fsdp",
    ],
    "precision": [
        "model.dtype=float64 training.precision=bfloat16",
        "model.attention=flash_attention_2",
        "model.attention=flash_attention_2 training.precision=bfloat16 training.device=cpu",
    ],
    "optimizer": [
        "model.dtype=float64 training.optimizer=adamw-8bit",
        "model.shared=true training.optimizer_in_backward=true training.clip=null training.spike_factor=null "
        "training.diagnose_every=null training.sharding=none",
        "model.dtype=bfloat16 training.optimizer=adamw-8bit",
    ],
}


def test_every_rule_is_tried():
    assert list(REFUSED) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_refuses_what_it_is_there_for_and_names_the_fields(rule):
    for settings in REFUSED[rule.__name__]:
        with pytest.raises(ConfigError) as refused:
            load_config(None, settings.split())
        named = [setting.partition("=")[0] for setting in settings.split()]
        assert any(name in str(refused.value) for name in named), (settings, str(refused.value))


def test_the_defaults_break_no_rule():
    assert not [message for rule in RULES for message in rule(RunConfig())]
