"""Packed embedding: batch-invariant rows, bounded packs, and a model that is left as it was."""

import pytest
import torch

from cosup_fast.data.packing import Pack
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.index import embed_passages, embed_queries


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 4096])
def test_each_row_is_its_passage_alone(model, passages, batch_tokens):
    embeddings = embed_passages(model, passages, batch_tokens=batch_tokens)
    with torch.no_grad():
        alone = torch.cat([model.embed(Pack.of([model.template.sequence(p)])) for p in passages])
    assert embeddings.dtype == torch.float32
    assert (embeddings - alone).abs().max() < 2e-6


def test_packs_are_bounded_and_sorted(model, passages, monkeypatch):
    packs: list[Pack] = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda pack: packs.append(pack) or embed(pack))
    embed_passages(model, passages, batch_tokens=60)
    lengths = [length for pack in packs for length in pack.lengths]
    assert lengths == sorted((len(model.template.sequence(p)) for p in passages), reverse=True)
    assert all(sum(pack.lengths) <= 60 or len(pack.lengths) == 1 for pack in packs)
    assert len(packs) < len(passages)


def test_embedding_leaves_no_trace_on_the_model(make_model, gpt2_folder, passages, examples, corpus):
    model = make_model(embseq=gpt2_folder)
    expected = embed_passages(model, passages)
    model.train()
    model.gen.base_model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(embed_passages(model, passages), expected)  # GPT-2 has dropout
    embed_queries(model, examples, corpus)
    assert [module.training for module in model.modules()] == modes
    expected.add_(1).requires_grad_()  # an ordinary tensor, no inference tensor
    with pytest.raises(ValueError, match="batch_tokens=0"):
        embed_passages(model, passages, batch_tokens=0)
    assert [module.training for module in model.modules()] == modes


def test_nothing_to_embed(model):
    assert embed_passages(model, []).shape == (0, 32)
    queries, asked = embed_queries(model, [], {})
    assert queries.shape == (0, 32)
    assert asked == []


@pytest.mark.parametrize("batch_tokens", [1, 150, 4096])
def test_queries_are_the_hidden_states_of_the_whole_example(model, examples, corpus, batch_tokens):
    queries, asked = embed_queries(model, examples, corpus, batch_tokens=batch_tokens)
    assert asked == [(0, "paris"), (1, "paris"), (1, "seine"), (2, "rome"), (3, "go"), (3, "go")]
    expected = []
    for example in examples:
        sequence = model.template.gen_sequence(example, corpus)
        with torch.no_grad():
            hidden = model.hidden_states(Pack.of([sequence.input_ids]))
            expected.append(model.queries(hidden, torch.tensor(sequence.query_rows)))
    assert (queries - torch.cat(expected)).abs().max() < 2e-6


def test_question_with_gold_but_no_output_asks_at_once(model, examples, corpus):
    asking = Example(id="q", question=examples[0].question, output=[], gold=["rome", "paris"])
    silent = Example(id="s", question="?", output=[Segment(text="no passage")])
    queries, asked = embed_queries(model, [silent, asking, examples[0]], corpus)
    assert asked == [(1, "rome"), (2, "paris")]
    torch.testing.assert_close(queries[0], queries[1])


def test_precision(model, passages):
    rough = embed_passages(model, passages)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = embed_passages(model, passages)
    assert 1e-4 < (rough - rounded).abs().max() < 0.1
    assert embed_passages(model, [Passage(id="a", title="", text="a")]).dtype == torch.float32
