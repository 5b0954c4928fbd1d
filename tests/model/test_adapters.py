"""LoRA and QLoRA: what moves and what does not, merged against unmerged, exact continuation, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cosup_fast.config.model import LoRAConfig, ModelConfig
from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.packing import Pack, PackLimits, make_batch
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.checkpoint import checkpoints
from cosup_fast.training.metrics import StepMetrics
from cosup_fast.training.trainer import Trainer

LORA = {"rank": 4, "dropout": 0.1}
VARIANTS = {
    "both": {"gen_lora": LORA, "embseq_lora": {"rank": 2}},
    "gen alone": {"gen_lora": LORA},
    "embseq alone": {"embseq_lora": LORA},
    "shared": {"gen_lora": LORA, "shared": True},
    "frozen embseq": {"gen_lora": LORA, "freeze_embseq": True},
    "tied, other layers": {"gen": "mistral", "gen_lora": LORA | {"targets": ["q_proj", "mlp.up_proj"]}},
    "gpt2": {"gen": "gpt2", "embseq": "gpt2", "gen_lora": LORA, "embseq_lora": LORA},
    "4 bits": {"gen_lora": LORA | {"quantize": "nf4"}, "embseq_lora": LORA | {"quantize": "fp4"}},
}


@pytest.fixture
def make(make_model, make_folder):
    """A function that makes a model of a variant whose adapters do something."""

    def make(variant):
        options = dict(VARIANTS[variant])
        if options.get("gen") == "mistral":
            options["gen"] = make_folder("mistral", tie_word_embeddings=True)
        if variant == "4 bits":  # in blocks of 64
            pytest.importorskip("bitsandbytes")
            options["gen"] = make_folder("llama", hidden_size=64, intermediate_size=64, tie_word_embeddings=False)
        return make_model(**options)

    return make


def _train(model, examples, corpus, output, steps=3, resume=None, total=None, seen=None):
    config = TrainingConfig(batch_size=2, lr=1e-2, eval_every=None, steps=total or steps, micro_batch_size=1)
    trainer = Trainer(model, config, examples, corpus, output, on_metrics=(seen if seen is not None else []).append)
    if resume is not None:
        trainer.resume(resume)
        return trainer.train()
    model.train()
    torch.manual_seed(0)
    for _ in range(steps):
        trainer.on_metrics(trainer.take_step())
    return trainer.save()


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_adapters_and_rows_of_new_tokens_move(variant, make, examples, corpus, tmp_path):
    model = make(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = _train(model, examples, corpus, tmp_path)
    template = model.template
    read = {template.nsp, template.context_start, template.context_end}
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    adapted = [name for name in ("gen", "embseq") if name in model.bases]
    for name in adapted:
        own = {n for n in moved if n.startswith(f"{name}.")}
        assert own
        assert all("lora_" in n or "trainable_tokens_delta" in n for n in own), own
        trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        assert {n for n in trained if n.startswith(f"{name}.")} == own
    if "gen" in adapted:
        parts = model.gen.get_input_embeddings(), model.gen.get_output_embeddings()
        tied = parts[0].token_adapter.base_layer.weight is parts[1].token_adapter.base_layer.weight
        for part, rows in zip(parts, (read | {template.pad} if tied else read, read | {template.pad}), strict=True):
            moved_rows = (part.weight.detach() != part.token_adapter.base_layer.weight).any(dim=1)
            assert set(moved_rows.nonzero().flatten().tolist()) == rows
    weights = load_file(saved / adapted[0] / "adapter_model.safetensors")
    assert all(".lora_" in n or n.endswith("trainable_tokens_delta") for n in weights)
    assert not (saved / adapted[0] / "model.safetensors").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_is_unmerged_to_rounding_and_loads_as_a_plain_model(variant, make, examples, corpus, tmp_path):
    saved = _train(make(variant), examples, corpus, tmp_path / "run")
    kept = CoSupervisionModel.load(saved, merge=False).eval()
    merged = CoSupervisionModel.load(saved).eval()
    merged.save(tmp_path / "plain")
    plain = CoSupervisionModel.load(tmp_path / "plain").eval()
    assert not (tmp_path / "plain" / "gen" / "adapter_config.json").exists()
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_modules())
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in merged.named_parameters()}
    for name, p in plain.named_parameters():
        assert torch.equal(p, merged.get_parameter(name)), name
    batch = make_batch(examples, corpus, kept.template)
    pack = batch.gen[0].pack
    for model in (kept, merged, plain):
        model.requires_grad_(False)
    hidden, expected = merged.hidden_states(pack), kept.hidden_states(pack)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.logits(hidden), kept.logits(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.embed(batch.passages[0]), kept.embed(batch.passages[0]), rtol=1e-4, atol=1e-4)
    assert plain.fingerprint() == merged.fingerprint() != kept.fingerprint()
    out, ours = merged.gen(input_ids=pack.input_ids[None, :5]).logits, merged.logits(merged.hidden_states(_first(pack)))
    torch.testing.assert_close(ours, out[0], rtol=1e-4, atol=1e-4)


def _first(pack):
    return Pack.of([pack.input_ids[:5].tolist()])


@pytest.mark.parametrize("variant", ["both", "shared", "embseq alone", "4 bits"])
def test_a_resumed_run_gives_the_same_bits(variant, make, examples, corpus, tmp_path):
    whole: list[StepMetrics] = []
    _train(make(variant), examples, corpus, tmp_path / "whole", 5, seen=whole)
    saved = _train(make(variant), examples, corpus, tmp_path / "parts", 3, total=5)
    torch.manual_seed(99)
    rest: list[StepMetrics] = []
    end = _train(
        CoSupervisionModel.load(saved, merge=False), examples, corpus, tmp_path / "parts", 5, resume=saved, seen=rest
    )
    assert [(m.step, m.loss, m.gen_grad_norm) for m in rest] == [(m.step, m.loss, m.gen_grad_norm) for m in whole[3:]]
    other = checkpoints(tmp_path / "whole" / "checkpoints")[-1]
    for path in end.rglob("*.safetensors"):
        ours, theirs = load_file(path), load_file(other / path.relative_to(end))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_an_adapter_that_was_not_trained_changes_nothing(make_model, examples, corpus):
    plain, adapted = make_model(), make_model(gen_lora=LORA, embseq_lora=LORA)
    batch = make_batch(examples, corpus, plain.template, PackLimits(sequences=2))
    assert plain(batch).loss.item() == pytest.approx(adapted(batch).loss.item(), rel=1e-6)


def test_adapters_of_bfloat16_weights_are_kept_in_float32(make_model, examples, corpus, tmp_path):
    model = make_model(dtype="bfloat16", gen_lora=LORA, embseq_lora=LORA)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    saved = _train(model, examples, corpus, tmp_path)
    assert {p.dtype for p in CoSupervisionModel.load(saved).parameters()} == {torch.bfloat16}


def test_adapters_are_refused_over_other_weights(make_folder, make_model, tmp_path):
    folder = make_folder("llama", seed=3)
    make_model(gen=folder, gen_lora=LORA).save(tmp_path / "saved")
    CoSupervisionModel.load(tmp_path / "saved")
    shutil.copy(make_folder("llama", seed=4) + "/model.safetensors", folder)
    with pytest.raises(ValueError, match=r"the adapters in .*gen belong to other weights of .* than there are now"):
        CoSupervisionModel.load(tmp_path / "saved")


def test_peft_reads_what_is_saved(make_model, llama_folder, examples, corpus, tmp_path):
    """Into the same model, once it has rows for the new tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saved = _train(make_model(gen_lora=LORA | {"dropout": 0.0}), examples, corpus, tmp_path)
    merged = CoSupervisionModel.load(saved).eval()
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    base.resize_token_embeddings(merged.vocabulary, mean_resizing=False)
    theirs = PeftModel.from_pretrained(base, saved / "gen").eval()
    tokens = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, merged.gen(tokens).logits, rtol=1e-4, atol=1e-4)


def test_targets_that_are_not_there_are_refused_before_weights_are_read(llama_folder, make_model, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=r"model\.gen_lora\.targets: .* no linear layer 'c_attn'; it has .*q_proj"):
        make_model(gen_lora=LORA | {"targets": ["q_proj", "c_attn"]})


def test_missing_bitsandbytes_is_named(make_model, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ValueError, match=r"model\.embseq_lora\.quantize=nf4 needs the package bitsandbytes"):
        make_model(embseq_lora=LORA | {"quantize": "nf4"})


def test_a_checkpoint_says_what_its_adapters_are(make_model, llama_folder, tmp_path):
    make_model(gen_lora=LORA, gen_layers=1).save(tmp_path)
    base = json.loads((tmp_path / "cosup.json").read_text())["adapters"]["gen"]
    assert (base["name"], base["layers"], base["lora"]["rank"]) == (llama_folder, 1, 4)
    assert CoSupervisionModel.load(tmp_path, merge=False).gen.config.num_hidden_layers == 1
    text = (tmp_path / "cosup.json").read_text()
    (tmp_path / "cosup.json").write_text(text.replace('"rank": 4', '"rank": 0'))
    with pytest.raises(ValueError, match=r"cosup.json is damaged: adapters.gen.lora: .*a rank of at least 1"):
        CoSupervisionModel.load(tmp_path)


def test_a_mixture_of_experts_is_adapted_where_it_can_be_loaded_again_or_refused(make_folder, tmp_path):
    """Adapters over fused experts used to be trained and saved, and could never be loaded."""
    folder = make_folder("mixtral", num_local_experts=4)
    with pytest.raises(ValueError, match=r"gen_lora.rank=2: MixtralForCausalLM is a mixture .*targets=\[k_proj,"):
        CoSupervisionModel.from_pretrained(ModelConfig(gen=folder, gen_lora=LoRAConfig(rank=2)))
    for target in ("gate_up_proj", "experts"):
        with pytest.raises(ValueError, match=f"has no linear layer '{target}'"):
            CoSupervisionModel.from_pretrained(ModelConfig(gen=folder, gen_lora=LoRAConfig(rank=2, targets=[target])))
    lora = LoRAConfig(rank=2, targets=["q_proj", "o_proj"])
    model = CoSupervisionModel.from_pretrained(ModelConfig(gen=folder, gen_lora=lora))
    with torch.no_grad():
        for name, p in model.gen.named_parameters():
            if "lora_B" in name:
                p += 0.1
    model.save(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model.eval().gen(input_ids=ids, use_cache=False).logits
        found = CoSupervisionModel.load(tmp_path / "saved").eval().gen(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_adapters_are_told_where_the_weights_under_them_have_moved(make_folder, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(make_folder("llama"), base)
    lora = LoRAConfig(rank=2)
    CoSupervisionModel.from_pretrained(ModelConfig(gen=str(base), shared=True, gen_lora=lora)).save(tmp_path / "saved")
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"are not at .*base.*: set COSUP_BASE_GEN to the folder that holds them"):
        CoSupervisionModel.load(tmp_path / "saved")
    monkeypatch.setenv("COSUP_BASE_GEN", make_folder("llama", seed=5))
    with pytest.raises(ValueError, match="belong to other weights"):
        CoSupervisionModel.load(tmp_path / "saved")
    monkeypatch.setenv("COSUP_BASE_GEN", str(tmp_path / "moved"))
    CoSupervisionModel.load(tmp_path / "saved")
