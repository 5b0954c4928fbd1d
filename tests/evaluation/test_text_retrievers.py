"""BM25 against its formula, and sentence-transformers models used as they were trained: queries apart from passages."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cosup_fast.data.records import Example, Passage
from cosup_fast.data.template import passage_text
from cosup_fast.evaluation import BM25Retriever, Corpus, DenseRetriever, IndexRetriever, text_retrievers
from cosup_fast.evaluation.retrievers import Request
from cosup_fast.evaluation.text_retrievers import K1, B, sentence_encoder, stems
from cosup_fast.export import export
from cosup_fast.index import SequenceIndex

QUESTIONS = ["What is the capital of France?", "Which river is 777 km long?", "Who founded Rome?", "Name a board game."]


def question(text: str, gold: str = "paris") -> Example:
    return Example(id=text[:40], question=text, output=[], gold=[gold])


def test_bm25_is_its_formula(passages):
    documents = [stems(f"{p.title} {p.text}") for p in passages]
    mean = sum(map(len, documents)) / len(documents)

    def score(query: str, words: list[str]) -> float:
        total, counts = 0.0, Counter(words)
        for word in stems(query):
            df = sum(word in other for other in documents)
            if not df:
                continue
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            total += idf * counts[word] / (counts[word] + K1 * (1 - B + B * len(words) / mean))
        return total

    queries = [*QUESTIONS, "rivers river Seine", "nothing matches zzz", "  ?! "]
    expected = [[score(query, words) for words in documents] for query in queries]
    np.testing.assert_allclose(BM25Retriever(passages).scores(queries), expected, rtol=1e-5)


def test_bm25_knows_inflections_and_no_accents():
    corpus = [Passage(id=str(i), title="", text=t) for i, t in enumerate(["A fox.", "The São rivers flow.", "Rivers"])]
    retriever = BM25Retriever(corpus)
    (found,) = retriever.rank([question("Sao river flowing", "1")], 3)
    assert [name for name, _ in found] == ["1", "2", "0"]
    assert found[2][1] == 0
    request = Request(question("zzz"), torch.zeros(1), (), 0)
    assert len(retriever.retrieve([request], 1)[0]) == 1  # nothing matches: still a passage


def test_no_text_is_searched_for_twice(passages, monkeypatch):
    retriever = BM25Retriever(passages)
    searched = []
    scores = BM25Retriever.scores
    monkeypatch.setattr(BM25Retriever, "scores", lambda self, texts: searched.extend(texts) or scores(self, texts))
    examples = [question(text) for text in QUESTIONS]
    given = retriever.retrieve([Request(example, torch.zeros(1), (), 0) for example in [*examples, examples[0]]], 3)
    ranked = retriever.rank(examples, 100)
    assert searched == QUESTIONS
    for found, ranking in zip(given, ranked):
        assert [(passage.id, score) for passage, score in found] == ranking[:3]
        assert len(ranking) == len(passages)
        assert [score for _, score in ranking] == sorted((score for _, score in ranking), reverse=True)


def test_what_is_remembered_has_a_bound(passages, monkeypatch):
    """A server is asked for ever, and never the same."""
    monkeypatch.setattr(text_retrievers, "REMEMBERED", 3)
    retriever = BM25Retriever(passages)
    for text in QUESTIONS * 2:
        request = Request(question(text), torch.zeros(4), (), 0)
        assert retriever.retrieve([request], 2) == BM25Retriever(passages).retrieve([request], 2)
        assert len(retriever._found) <= 3


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_an_exported_retriever_ranks_as_the_model_does(make_model, gpt2_folder, passages, tmp_path, similarity):
    """Queries through Gen, passages through Embseq: `encode` would send both through the same side."""
    model = make_model(embseq=gpt2_folder, nsp={"similarity": similarity})
    export(model, tmp_path / "retriever", "retriever")
    examples = [question(text) for text in QUESTIONS]
    corpus = [p for p in passages if p.id != "marks"]  # an export reads special tokens in a text as that text
    ours = IndexRetriever(model, SequenceIndex.build(model, corpus, progress=False)).rank(examples, 10)
    dense = DenseRetriever(str(tmp_path / "retriever"), corpus, model.template.config.passage)
    theirs = dense.rank(examples, 10)
    for expected, found in zip(ours, theirs, strict=True):
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-4)


def test_the_prompts_of_an_encoder_are_used(make_folder, passages, tmp_path):
    """As E5 asks for: `query: ` and `passage: ` before the text."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    prompts = {"query": "query: ", "document": "passage: "}
    encoder = SentenceTransformer(modules=[Transformer(make_folder("llama")), Pooling(32)], prompts=prompts)
    encoder.save(str(tmp_path / "e5"))
    retriever = DenseRetriever(str(tmp_path / "e5"), passages, "{title} {text}")
    plain = [f"passage: {passage_text('{title} {text}', p.title, p.text)}" for p in passages]
    queries, documents = (
        encoder.encode(texts, normalize_embeddings=True) for texts in ([f"query: {text}" for text in QUESTIONS], plain)
    )
    np.testing.assert_allclose(retriever.scores(QUESTIONS), queries @ documents.T, atol=1e-5)
    assert retriever.origin["weights"] != ""


def test_chance_is_what_random_rankings_find(passages):
    import random

    paragraphs = [Passage(id=f"page#{n}", title="page", text=f"{n}") for n in range(3)]
    corpus = Corpus([*passages, *paragraphs])
    assert corpus.chance(["paris"], 5) == 5 / 14
    assert corpus.chance(["paris", "atlantis"], 5) == 5 / 28
    assert corpus.chance(["paris"], 20) == 1
    draw = random.Random(0)
    names = list(corpus.by_id)
    hits = [any(name.startswith("page#") for name in draw.sample(names, 5)) for _ in range(20_000)]
    assert corpus.chance(["page"], 5) == pytest.approx(sum(hits) / len(hits), abs=0.015)


@pytest.mark.parametrize("kind", ["retriever", "embseq"])
def test_a_sentence_transformer_that_lacks_weights_is_refused(make_model, tmp_path, kind):
    """They would be random."""
    export(make_model(), tmp_path / "out", kind)
    sentence_encoder(str(tmp_path / "out"), "cpu")
    path = max((tmp_path / "out").rglob("model.safetensors"))
    save_file({k: x for k, x in load_file(path).items() if "layers.1.self_attn.q_proj" not in k}, path)
    sentence_encoder.cache_clear()
    with pytest.raises(ValueError, match=r"lacks layers\.1\.self_attn\.q_proj\.weight, which would be left random"):
        sentence_encoder(str(tmp_path / "out"), "cpu")


@pytest.mark.parametrize("kind", ["retriever", "embseq"])
def test_code_in_a_sentence_transformer_is_never_run(make_model, tmp_path, kind):
    folder = tmp_path / "out"
    export(make_model(), folder, kind)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    path = folder / ("router_config.json" if kind == "retriever" else "modules.json")
    path.write_text(re.sub(r"sentence_transformers\.models\.Pooling", "evil.Evil", path.read_text()))
    with pytest.raises(ValueError, match=r"has the module 'evil\.Evil' .* is never run"):
        sentence_encoder(str(folder), "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
@pytest.mark.parametrize("beside", [None, "other.safetensors"])
def test_a_pickle_in_a_module_of_a_sentence_transformer_is_never_loaded(make_model, tmp_path, name, beside):
    """sentence-transformers would fall back to torch.load for a Dense module without safetensors."""
    folder = tmp_path / "out"
    export(make_model(), folder, "embseq")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    if beside:  # which the module does not read
        (folder / "2_Dense" / beside).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"weights only in .*2_Dense/{name}, a pickle"):
        sentence_encoder(str(folder), "cpu")
