"""Exports: other libraries load them without trusted code and compute the same vectors and logits."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import passage_text
from cosup_fast.export.card import RunFacts
from cosup_fast.export.sentence_transformers import export
from cosup_fast.generation import Generator
from cosup_fast.index import embed_passages, embed_queries
from cosup_fast.training.checkpoint import chosen_checkpoint
from cosup_fast.training.log import read_metrics

QUESTIONS = ["What is the capital of France?", "  two  spaces, 囲碁 👩‍👧?", "[NSP] or </s>?", "a\nb\n", "e\u0301"]


@pytest.fixture(
    scope="module", params=["llama+gpt2 cosine", "llama+gpt2 dot", "gpt2+llama dot", "shared cosine", "llama+llama dot"]
)
def pair(request, make_model, gpt2_folder, llama_folder):
    """A projection with another tokenizer (which puts <s> before a text), both ways; one set of weights; two."""
    models = {
        "llama+gpt2": {"embseq": gpt2_folder},
        "gpt2+llama": {"gen": gpt2_folder, "embseq": llama_folder},
        "shared": {"shared": True},
        "llama+llama": {},
    }
    kind, similarity = request.param.split()
    model = make_model(nsp={"similarity": similarity}, **models[kind])
    with torch.no_grad():  # the two sides differ after training
        for p in (model.embseq or model.gen).parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    return model


def _texts(model, passages):
    return [passage_text(model.template.config.passage, p.title, p.text) for p in passages]


def _same(found, expected):
    assert (found.cpu() - expected).norm() <= 1e-5 * expected.norm()


def test_embseq_as_sentence_transformer(pair, passages, tmp_path):
    export(pair, tmp_path / "out", "embseq")
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    expected = embed_passages(pair, passages)
    for batch_size in (1, 4, 32):
        _same(loaded.encode(_texts(pair, passages), batch_size=batch_size, convert_to_tensor=True), expected)
    assert loaded.similarity_fn_name == pair.nsp.similarity
    assert loaded.get_embedding_dimension() == pair.width
    scores = loaded.similarity(expected[:2], expected)
    torch.testing.assert_close(scores, expected[:2] @ expected.T, rtol=1e-5, atol=1e-5)


def test_retriever_as_sentence_transformer(pair, passages, tmp_path):
    export(pair, tmp_path / "out", "retriever")
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    _same(loaded.encode_document(_texts(pair, passages), convert_to_tensor=True), embed_passages(pair, passages))
    asking = [Example(id=q, question=q, output=[], gold=["p"]) for q in QUESTIONS]
    expected, _ = embed_queries(pair, asking, {})
    for batch_size in (1, 32):
        _same(loaded.encode_query(QUESTIONS, batch_size=batch_size, convert_to_tensor=True), expected)
    query = Generator(pair, lambda query, k: []).query(QUESTIONS[0])
    _same(loaded.encode_query(QUESTIONS[0], convert_to_tensor=True), query)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2"])
def test_the_template_is_carried_whatever_transformers_makes_of_an_architectures_tokenizer(
    make_model, make_folder, passages, tmp_path, kind
):
    """AutoTokenizer makes Qwen2's again from its vocabulary and would drop the template."""
    model = make_model(gen=make_folder(kind, head_dim=8) if kind == "gemma2" else make_folder(kind))
    export(model, tmp_path / "out", "retriever")
    # Some releases of transformers drop Gemma 2's soft cap of attention scores unless attention is eager.
    eager = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs=eager)
    _same(loaded.encode_document(_texts(model, passages), convert_to_tensor=True), embed_passages(model, passages))
    expected, _ = embed_queries(model, [Example(id=q, question=q, output=[], gold=["p"]) for q in QUESTIONS], {})
    _same(loaded.encode_query(QUESTIONS, convert_to_tensor=True), expected)


def test_both_sides_apart(pair, passages, tmp_path):
    """As BEIR calls a pair of models: `encode` for both, passages as title, separator and text."""
    for kind in ("query", "embseq"):
        export(pair, tmp_path / kind, kind)
    queries, documents = (SentenceTransformer(str(tmp_path / kind), device="cpu") for kind in ("query", "embseq"))
    expected, _ = embed_queries(pair, [Example(id=q, question=q, output=[], gold=["p"]) for q in QUESTIONS], {})
    options = {"prompt": None, "prompt_name": None, "convert_to_tensor": True}
    _same(queries.encode(QUESTIONS, batch_size=16, **options), expected)
    titled = [p.model_copy(update={"text": p.text.strip()}) for p in passages if p.title]
    joined = [(passage.title + " :: " + passage.text).strip() for passage in titled]
    _same(documents.encode(joined, batch_size=8, **options), embed_passages(pair, titled))


def test_long_passages_are_cut_as_in_training(make_model, tmp_path):
    model = make_model(text={"max_passage_tokens": 9, "long_passages": "truncate"})
    long = Passage(id="p", title="Long", text="one two three " * 30)
    export(model, tmp_path / "out", "embseq")
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    _same(loaded.encode(_texts(model, [long]), convert_to_tensor=True), embed_passages(model, [long]))


def test_an_exported_gen_ends_with_the_token_it_was_trained_to_end_with(make_model, llama_folder, tmp_path):
    """Whatever token the generation config of its base names."""
    shutil.copytree(llama_folder, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 7, "max_length": 9}')
    model = make_model(gen=str(tmp_path / "base"), shared=True)
    export(model, tmp_path / "out", "gen")
    gen = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert gen.generation_config.eos_token_id == model.template.eos == 1
    assert model.gen.generation_config.eos_token_id == 7  # of the model in memory nothing changes


def test_gen_as_causal_lm(pair, tmp_path):
    export(pair, tmp_path / "out", "gen")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    gen = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[*pair.template.prompt("Who?"), pair.template.nsp, pair.template.context_start]])
    with torch.no_grad():
        logits = gen(ids).logits
        expected = pair.gen(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert tokenizer.convert_tokens_to_ids("[NSP]") == pair.template.nsp
    assert tokenizer.get_vocab() == pair.template.tokenizer.get_vocab()
    assert gen.generation_config.eos_token_id == pair.template.eos
    text = gen.generate(ids, max_new_tokens=3, do_sample=False)
    assert text.shape[1] > ids.shape[1]


@pytest.mark.parametrize("kind", ["retriever", "query", "embseq", "gen"])
def test_nothing_is_code_or_names_this_library(make_model, tmp_path, kind):
    export(make_model(), tmp_path / "out", kind)
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix == ".json" and path.name != "tokenizer.json":
            assert not re.search("auto_map|trust_remote_code|packed_sdpa|cosup_fast", path.read_text()), path
        assert path.is_dir() or path.suffix in (".json", ".safetensors", ".md", ".jinja", ".txt"), path


def test_an_export_replaces_an_export_and_nothing_else(make_model, tmp_path):
    model = make_model()
    export(model, tmp_path / "out", "gen")
    export(model, tmp_path / "out", "embseq")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["kind"] == "embseq"
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds something else, it has no export\.json"):
        export(model, tmp_path / "mine", "gen")
    with pytest.raises(ValueError, match="kind='onnx': choose from retriever, query, embseq, gen"):
        export(model, tmp_path / "new", "onnx")  # type: ignore[arg-type]


def test_what_a_tokenizer_cannot_say_is_refused(make_model, tmp_path):
    twice = make_model(text={"prompt": "{question} {question}"})
    with pytest.raises(ValueError, match=r"has \{question\} more than once: export embseq or gen"):
        export(twice, tmp_path / "out", "retriever")
    export(twice, tmp_path / "out", "embseq")
    bare = make_model(text={"prompt": "{question}"})
    export(bare, tmp_path / "bare", "retriever")
    loaded = SentenceTransformer(str(tmp_path / "bare"), device="cpu")
    expected = Generator(bare, lambda query, k: []).query("Who?")
    _same(loaded.encode_query("Who?", convert_to_tensor=True), expected)


def test_the_card_tells_what_the_run_knows(cosup, arguments, llama_folder, data_folder, tmp_path):
    lines = (data_folder / "examples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "dev.jsonl").write_text("".join(lines[2:]))
    data = {name: f"[{tmp_path / name}.jsonl]" for name in ("train", "dev")}
    changes = {"data.train": data["train"], "data.dev": data["dev"], "training.steps": 2, "training.eval_every": 1}
    status, _, err = cosup("train", *arguments(**changes))
    assert status == 0, err
    for kind in ("retriever", "query", "embseq", "gen"):
        status, out, err = cosup(
            "export", tmp_path / "run", tmp_path / kind, "--what", kind, "--license", "MIT", "--name", "Ours"
        )
        assert (status, f"{kind}: " in out) == (0, True), err
        _, front, body = (tmp_path / kind / "README.md").read_text().split("---\n", 2)
        front = yaml.safe_load(front)
        assert front["license"] == "mit"
        assert front["base_model"] == [llama_folder]
        assert front["library_name"] == ("transformers" if kind == "gen" else "sentence-transformers")
        assert body.lstrip().startswith("# Ours\n")
        assert ("An empty question gets no prompt" in " ".join(body.split())) is (kind in ("retriever", "query"))
        last = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "held-out"][-1]
        assert f"| recall_at_5 | {last['recall_at_5']:.4g} |" in body
        assert f"| ntp | {last['ntp']:.4g} |" in body
        assert "- steps: 2" in body
        config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.DOTALL)[1])
        assert config["training"]["batch_size"] == 2
    copied = tmp_path / "run" / "checkpoints" / "best-copy"
    shutil.copytree(chosen_checkpoint(tmp_path / "run"), copied)
    assert (RunFacts.of(copied).step, RunFacts.of(copied).held_out) == (2, last)
    status, _, err = cosup("export", tmp_path / "run", tmp_path / "x", "--what", "onnx")
    assert (status, "choose from retriever, query, embseq, gen" in err) == (1, True)


def test_the_card_of_a_bare_checkpoint_says_that_nothing_is_known(make_model, tmp_path):
    model = make_model()
    model.save(tmp_path / "checkpoint")
    facts = RunFacts.of(tmp_path / "checkpoint")
    export(model, tmp_path / "out", "gen", facts)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was recorded about it." in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "unknown")
    prepared = RunFacts(
        config={"model": {"gen": "smollm2-135m"}, "data": {"corpus": "wiki-leads", "train": [], "dev": []}}
    )
    export(model, tmp_path / "out", "gen", prepared)
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert "wiki-leads (CC BY-SA 4.0)" in card
    assert "No held-out figures were recorded." in card
