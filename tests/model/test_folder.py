"""A checkpoint is the model that was saved, whole, and never a pickle."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cosup_fast.config.model import ModelConfig
from cosup_fast.data.packing import make_batch
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.folder import check_saving


def test_a_pickle_is_never_loaded(llama_folder, tmp_path, make_model):
    folder = tmp_path / "pickled"
    shutil.copytree(llama_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{folder} holds no \*\.safetensors.* is a pickle.*convert it"):
        make_model(gen=str(folder))
    with pytest.raises(ValueError, match="is a pickle"):
        make_model(embseq=str(folder))


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "saved")
    return tmp_path / "saved"


VARIANTS = {
    "two": {},
    "shared": {"shared": True},
    "frozen": {"freeze_embseq": True},
    "learned temperature": {"nsp": {"learnable_temperature": True, "temperature": 0.5}},
    "dot": {"nsp": {"similarity": "dot", "temperature": 8.0}},
    "fp64": {"dtype": "float64"},
    "bf16": {"dtype": "bfloat16"},
    "template": {"text": {"passage": "{text} ({title})", "label_passages": True}},
    "projected": {"embseq": "gpt2"},
    "tied and resized": {"gen": "gpt2"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(make_model, examples, corpus, tmp_path, variant):
    model = make_model(**VARIANTS[variant])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save(tmp_path / "saved")
    loaded = CoSupervisionModel.load(tmp_path / "saved").eval()
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.nsp == model.nsp
    assert loaded.template.config == model.template.config
    assert loaded.freeze_embseq == model.freeze_embseq
    batch, again = (make_batch(examples, corpus, m.template) for m in (model, loaded))
    assert torch.equal(batch.gen[0].pack.input_ids, again.gen[0].pack.input_ids)
    assert torch.equal(batch.passages[0].input_ids, again.passages[0].input_ids)
    with torch.no_grad():
        before, after = model(batch), loaded(again)
        assert torch.equal(before.loss, after.loss)
        assert torch.equal(model.embed(batch.passages[0]), loaded.embed(again.passages[0]))
    loaded.save(tmp_path / "twice")
    assert CoSupervisionModel.load(tmp_path / "twice").fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no cosup.json"),
        (b"", "damaged"),
        (b'{"format_version": 1, ', "damaged"),
        (b"\xff\xfe{}", "damaged"),
        (b"[]", "damaged|format_version"),
        (b"{}", "format_version None"),
        (b'{"format_version": 2}', "format_version 2, this release reads 1"),
        (b'{"format_version": 1}', "damaged|incomplete"),
    ],
)
def test_wrong_description_is_refused(saved, content, message):
    path = saved / "cosup.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CoSupervisionModel.load(saved)


def test_heads_must_be_whole(saved, make_model, gpt2_folder, tmp_path):
    make_model(embseq=gpt2_folder).save(tmp_path / "projected")
    shutil.copy(tmp_path / "projected" / "heads.safetensors", saved / "heads.safetensors")
    with pytest.raises(ValueError, match=r"projection\.weight"):
        CoSupervisionModel.load(saved)
    (saved / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match=r"heads.safetensors"):
        CoSupervisionModel.load(saved)


@pytest.mark.parametrize("part", ["gen", "embseq"])
def test_missing_models_are_named(saved, part):
    shutil.rmtree(saved / part)
    with pytest.raises(ValueError, match=part):
        CoSupervisionModel.load(saved)


def test_unknown_setting_in_the_description_is_refused(saved):
    description = json.loads((saved / "cosup.json").read_text())
    description["nsp"]["margin"] = 1
    (saved / "cosup.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="margin"):
        CoSupervisionModel.load(saved)


def test_fingerprint_changes_with_any_weight(make_model, gpt2_folder):
    model = make_model(embseq=gpt2_folder, nsp={"learnable_temperature": True})
    seen = {model.fingerprint()}
    assert model.fingerprint() in seen
    tensors = model.state_dict()
    for tensor in tensors.values():
        last = tensor.reshape(-1)[-1:]
        kept = last.clone()
        last.copy_(torch.nextafter(kept, kept + 1))
        seen.add(model.fingerprint())
        last.copy_(kept)
    assert len(seen) == 1 + len(tensors)
    assert model.fingerprint() == make_model(embseq=gpt2_folder, nsp={"learnable_temperature": True}).fingerprint()


def test_fingerprint_changes_with_template_and_similarity(make_model):
    made = [
        make_model(),
        make_model(nsp={"similarity": "dot"}),
        make_model(text={"passage": "{title}: {text}"}),
        make_model(text={"max_passage_tokens": 100}),
        make_model(dtype="float64"),
        make_model(shared=True),
    ]
    assert len({model.fingerprint() for model in made}) == len(made)
    # What neither a query nor an embedding depends on does not make an index stale.
    assert make_model(nsp={"weight": 3.0}).fingerprint() == made[0].fingerprint()


def test_a_generation_config_that_transformers_reads_and_does_not_write_is_saved(llama_folder, tmp_path):
    """A temperature without sampling: the first checkpoint used to fail after hundreds of steps."""
    shutil.copytree(llama_folder, tmp_path / "gen")
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 1}
    (tmp_path / "gen" / "generation_config.json").write_text(json.dumps(settings))
    model = CoSupervisionModel.from_pretrained(ModelConfig(gen=str(tmp_path / "gen"), shared=True))
    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "gen" / "generation_config.json").read_text())["temperature"] == 0.6
    CoSupervisionModel.load(tmp_path / "saved")


def test_what_cannot_be_saved_is_known_before_it_is_trained(make_model, monkeypatch):
    model = make_model()
    check_saving(model)

    def refuse(folder):
        raise NotImplementedError("no slow form")

    monkeypatch.setattr(model.template.tokenizer, "save_pretrained", refuse)
    with pytest.raises(ValueError, match=r"could be trained and not saved \(no slow form\)"):
        check_saving(model)


def test_a_checkpoint_is_checked_like_a_model(saved, make_folder):
    shutil.rmtree(saved / "embseq")
    shutil.copytree(make_folder("bert"), saved / "embseq")
    with pytest.raises(ValueError, match=r"Embseq '.*embseq' \(BertModel\) reads"):
        CoSupervisionModel.load(saved)
