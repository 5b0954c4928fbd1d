"""Pretrained models are read whole or refused, and nothing that comes with them is run."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from cosup_fast.config.model import ModelConfig
from cosup_fast.data.template import TextConfig
from cosup_fast.model.loading import load_template
from cosup_fast.model.pretrained import read_config, read_model, read_tokenizer

PACKAGE = Path(__file__).parents[2] / "cosup_fast"


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of a Llama's folder, and a function that rewrites its tensors."""
    copy = tmp_path / "model"
    shutil.copytree(llama_folder, copy)

    def rewrite(change):
        tensors = load_file(copy / "model.safetensors")
        save_file(change(tensors), copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return rewrite


def test_a_whole_model_is_read_with_and_without_its_head(llama_folder, gpt2_folder):
    for source in (llama_folder, gpt2_folder):
        for factory in (AutoModelForCausalLM, AutoModel):
            assert not read_model(factory, source).training


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: {k: x for k, x in t.items() if "layers.1.mlp.up_proj" not in k},
            r"lacks model.layers.1.mlp.up_proj",
        ),
        (lambda t: {f"module.{k}": x for k, x in t.items()}, r"lacks \d+ tensors .*instead|holds .*module\."),
        (lambda t: {}, r"lacks \d+ tensors \(lm_head.weight, .* and \d+ more\)"),
        (lambda t: {k: x for k, x in t.items() if k != "lm_head.weight"}, r"lacks lm_head.weight, which would be left"),
        (
            lambda t: {k: x[:, :-1].contiguous() if "q_proj" in k else x for k, x in t.items()},
            r"2 tensors of other shapes",
        ),
    ],
    ids=["one tensor", "a prefix", "empty", "no head", "other shapes"],
)
def test_missing_weights_are_refused(folder, change, said):
    with pytest.raises(ValueError, match=said):
        read_model(AutoModelForCausalLM, folder(change))


def test_a_tied_head_is_not_missing(make_folder):
    tied = Path(make_folder("llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    read_model(AutoModelForCausalLM, tied)


def test_an_embseq_folder_as_gen_is_refused(make_model, llama_folder, tmp_path):
    from cosup_fast.model import CoSupervisionModel

    make_model(gen=llama_folder).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"lacks lm_head.weight"):
        CoSupervisionModel.from_pretrained(ModelConfig(gen=str(tmp_path / "saved" / "embseq")))


def test_shards_are_all_read_or_the_model_is_refused(llama_folder, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(llama_folder)
    whole.save_pretrained(tmp_path, max_shard_size="20kB")
    index = tmp_path / "model.safetensors.index.json"
    parts = json.loads(index.read_text())
    files = sorted(set(parts["weight_map"].values()))
    assert len(files) > 2
    read_model(AutoModelForCausalLM, tmp_path)
    only_first = {**parts, "weight_map": {k: f for k, f in parts["weight_map"].items() if f == files[0]}}
    index.write_text(json.dumps(only_first))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors"):
        read_model(AutoModelForCausalLM, tmp_path)
    for name in ("../elsewhere.safetensors", "/etc/weights.safetensors", "pytorch_model.bin", 3):
        index.write_text(json.dumps({**parts, "weight_map": {**parts["weight_map"], "lm_head.weight": name}}))
        with pytest.raises(ValueError, match=rf"names {re.escape(repr(name))}: every entry"):
            read_model(AutoModelForCausalLM, tmp_path)
    index.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        read_model(AutoModelForCausalLM, tmp_path)
    index.write_text(json.dumps(parts))
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"names {files[1]}, which is missing"):
        read_model(AutoModelForCausalLM, tmp_path)


def test_layers_that_the_configuration_lacks_are_refused_unless_they_are_cut_off(folder, make_model):
    copy = folder(lambda tensors: tensors)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for factory in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=r"also holds 9 tensors \(model\.layers\.1\..*no layer: use the configur"):
            read_model(factory, copy)
    with pytest.raises(ValueError, match=r"also holds 9 tensors .*model\.gen_layers"):
        make_model(gen=str(copy))
    assert make_model(gen=str(copy), gen_layers=1, embseq_layers=1).gen.config.num_hidden_layers == 1


def test_integers_that_nothing_says_how_to_scale_are_refused(folder):
    copy = folder(lambda t: {k: x.to(torch.int8) if "layers.1.mlp.up_proj" in k else x for k, x in t.items()})
    with pytest.raises(ValueError, match=r"holds model\.layers\.1\.mlp\.up_proj\.weight in integers \(I8\)"):
        read_model(AutoModelForCausalLM, copy)


def test_a_head_that_the_configuration_would_tie_is_not_lost(folder, make_model):
    copy = folder(lambda tensors: tensors)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"holds a head that differs from its embeddings"):
        make_model(gen=str(copy))
    folder(lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    gen = make_model(gen=str(copy)).gen
    assert gen.get_output_embeddings().weight is gen.get_input_embeddings().weight


@pytest.mark.parametrize("part", ["gen", "embseq"])
def test_a_tokenizer_with_tokens_beyond_the_embeddings_is_refused(llama_folder, make_model, tmp_path, part):
    """Of a word, and of an end of sequence that its tokenizer adds."""
    for number, content in enumerate(("word", "</end>")):
        copy = tmp_path / f"{number}"
        shutil.copytree(llama_folder, copy)
        tokenizer = read_tokenizer(copy)
        rows = len(load_file(copy / "model.safetensors")["lm_head.weight"])
        spare = [f"spare {i}" for i in range(rows - len(tokenizer))]
        tokenizer.add_tokens(spare)
        make_model(**{part: _saved(tokenizer, copy)})
        tokenizer.add_tokens(content) if content == "word" else tokenizer.add_special_tokens({"eos_token": content})
        _saved(tokenizer, copy)
        with pytest.raises(ValueError, match=rf"token '{content}' with the id {rows}, and the model has {rows} emb"):
            make_model(**{part: str(copy)})


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_each_model_has_its_own_positions(llama_folder, gpt2_folder):
    template, _ = load_template(ModelConfig(gen=llama_folder, embseq=gpt2_folder), TextConfig())
    assert (template.max_length, template.embseq_max_length) == (512, 320)


def test_special_tokens_may_have_any_ids(llama_folder, make_model, tmp_path):
    """Ids with a hole, and a special token that no text becomes beyond the embeddings, as Gemma 3's image token."""
    copy = tmp_path / "model"
    shutil.copytree(llama_folder, copy)
    path = copy / "tokenizer.json"
    described = json.loads(path.read_text())
    described["added_tokens"].append({**described["added_tokens"][-1], "id": 317, "content": "<image>"})
    path.write_text(json.dumps(described))
    model = make_model(gen=str(copy))
    t = model.template
    assert min(t.nsp, t.context_start, t.context_end, t.pad) > 300
    assert max(t.tokenizer.get_vocab().values()) < model.vocabulary == len(model.gen.get_input_embeddings().weight)


@pytest.mark.parametrize("part", ["configuration", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(llama_folder, tmp_path, part):
    """In a process whose standard input would answer yes."""
    copy = tmp_path / "model"
    shutil.copytree(llama_folder, copy)
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    name, key = ("config.json", "AutoConfig") if part == "configuration" else ("tokenizer_config.json", "AutoTokenizer")
    described = json.loads((copy / name).read_text())
    described["auto_map"] = {key: "evil.Evil" if part == "configuration" else ["evil.Evil", None]}
    if part == "configuration":
        described["model_type"] = "evil"
    else:
        described["tokenizer_class"] = "Evil"
        (copy / "tokenizer.json").unlink()
    (copy / name).write_text(json.dumps(described))
    code = (
        "import sys; from cosup_fast.config.model import ModelConfig; from cosup_fast.model import CoSupervisionModel;"
        f"CoSupervisionModel.from_pretrained(ModelConfig(gen={str(copy)!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], input="y\ny\ny\n", capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=rf"the {part} of .* is Python code that comes with the model"):
        (read_config if part == "configuration" else read_tokenizer)(copy)


def test_every_loading_call_of_the_package_refuses_remote_code():
    """`from_pretrained` and `from_config` of transformers and sentence-transformers say trust_remote_code=False."""
    calls = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            ours = called.startswith("CoSupervisionModel.") or called.split(".")[0] in ("cls",)
            loads = called.endswith((".from_pretrained", ".from_config")) or called == "SentenceTransformer"
            if not loads or ours or "gguf_file" in ast.unparse(node):  # a GGUF file holds no code
                continue
            calls += 1
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}: {called}"
    assert calls >= 4
