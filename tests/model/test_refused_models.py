"""Models and settings that packs or the losses do not suit are refused, by trying them."""

import pytest
import torch

from cosup_fast.config.model import ModelConfig, NSPConfig


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gen": "a", "shared": True, "embseq": "b"}, "model.embseq='b'"),
        ({"shared": True, "embseq_layers": 1}, "embseq_layers=1"),
        ({"shared": True, "freeze_embseq": True}, "would freeze Gen"),
        ({"attention": "flash_attention_2", "dtype": "float64"}, "16-bit"),
        ({"layers": 3}, "layers"),
    ],
)
def test_inconsistent_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**setting)


HYBRID = {"layer_types": ["conv", "full_attention"]}
NO_ATTENTION = "has no attention that packs can use: .*choose another model, or model.attention=flash_attention_2"


@pytest.mark.parametrize("role", ["Gen", "Embseq"])
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lfm2", HYBRID, r"\(Lfm2Model\) mixes the sequences of a pack"),
        ("stablelm", {}, r"\(StableLmModel\) mixes the sequences of a pack"),
        ("roberta", {"is_decoder": True}, r"\(RobertaModel\) reads a sequence of a pack otherwise than alone"),
        ("falcon", {}, NO_ATTENTION),
        ("bloom", {}, NO_ATTENTION),
        (
            "gpt_oss",
            {"head_dim": 8, "num_local_experts": 4},
            "has no attention .*: its layers attend with sinks",
        ),
        ("doge", {"sliding_window": 9}, "has no attention .*: its layers see 9 tokens through a mask alone"),
        (
            "gemma3_text",
            {"head_dim": 8, "use_bidirectional_attention": True},
            r"\(Gemma3TextModel\) reads a sequence of a pack otherwise than alone",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_models_that_packs_do_not_suit_are_refused(make_model, make_folder, role, kind, options, message):
    folder = make_folder(kind, **options)
    with pytest.raises(ValueError, match=f"{role} '{folder}' {message}"):
        make_model(gen=folder, shared=True) if role == "Gen" else make_model(embseq=folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_sequences_stand_out_from_rounding(make_model, make_folder, gpt2_folder, dtype):
    make_model(gen=make_folder("llama", num_hidden_layers=24), embseq=gpt2_folder, dtype=dtype)
    with pytest.raises(ValueError, match="mixes"):
        make_model(gen=make_folder("lfm2", **HYBRID), shared=True, dtype=dtype)


def test_a_bidirectional_embseq_is_refused(make_model, make_folder):
    with pytest.raises(ValueError, match=r"Embseq .*\(BertModel\) reads a sequence of a pack otherwise than alone"):
        make_model(embseq=make_folder("bert"))


def test_a_head_with_layers_of_its_own_is_refused(make_model, make_folder):
    folder = make_folder("bert", is_decoder=True)
    with pytest.raises(
        ValueError, match=r"BertLMHeadModel.*logits are not those of its head 'cls.predictions.decoder'"
    ):
        make_model(gen=folder, shared=True)


def test_the_check_leaves_no_trace(make_model, gpt2_folder, monkeypatch):
    def made() -> tuple:
        model = make_model(gen=gpt2_folder, embseq=gpt2_folder)
        return torch.get_rng_state(), model.fingerprint(), [module.training for module in model.modules()]

    checked = made()
    monkeypatch.setattr("cosup_fast.model.model.check_model", lambda *args: None)
    for a, b in zip(checked, made(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_wrong_nsp_settings_are_refused():
    for setting in ({"temperature": 0}, {"weight": -1}, {"similarity": "l2"}, {"label_smoothing": 1}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            NSPConfig(**setting)
