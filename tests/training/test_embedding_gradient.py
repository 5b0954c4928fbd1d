"""Rows added to `.grad` are the dense gradient of autograd, bit for bit, and only where nothing else watches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cosup_fast.data.packing import PackLimits, make_batch
from cosup_fast.training import embedding_gradient
from cosup_fast.training.embedding_gradient import embedding_rows
from cosup_fast.training.step import accumulate_gradients


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, make_folder, make_model):
    return make_model(gen=make_folder("llama", tie_word_embeddings=request.param)).train()


def gradients(model, batch, times=1):
    model.zero_grad(set_to_none=True)
    for _ in range(times):
        accumulate_gradients(model, batch)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def dense(monkeypatch):
    monkeypatch.setattr(embedding_gradient, "plain_embedding", lambda part: None)


@pytest.mark.parametrize("times", [1, 2])
def test_gradients_are_those_of_autograd(times, model, examples, corpus, monkeypatch):
    batch = make_batch(examples, corpus, model.template)
    ours = gradients(model, batch, times)
    dense(monkeypatch)
    expected = gradients(model, batch, times)
    assert ours.keys() == expected.keys()
    for name, b in expected.items():
        if times == 1:
            assert torch.equal(ours[name], b), name
        torch.testing.assert_close(ours[name], b, rtol=1e-6, atol=1e-9)


def test_no_dense_gradient_is_made(model, examples, corpus):
    batch = make_batch(examples, corpus, model.template, PackLimits(sequences=2))
    with torch.profiler.profile() as seen:
        gradients(model, batch)
    assert not [event.key for event in seen.key_averages() if "embedding_dense_backward" in event.key]


def test_the_modules_are_as_they_were_also_after_an_error(model, examples, corpus, monkeypatch):
    embeddings = [part.get_input_embeddings() for _, part in model.parts()]
    with embedding_rows(model):
        assert all("forward" in module.__dict__ for module in embeddings)
    monkeypatch.setattr(model, "gen_losses", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(model, make_batch(examples, corpus, model.template))
    assert not any("forward" in module.__dict__ for module in embeddings)


def test_a_weight_with_hooks_and_an_embedding_that_computes_more_are_left_alone(model):
    class Scaled(nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    module = model.gen.get_input_embeddings()
    handle = module.weight.register_post_accumulate_grad_hook(lambda p: None)
    assert embedding_gradient.plain_embedding(model.gen) is None
    handle.remove()
    assert embedding_gradient.plain_embedding(model.gen) is module

    class Part:
        def __init__(self, module):
            self.get_input_embeddings = lambda: module

    for other in (
        Scaled(4, 2), nn.Embedding(4, 2, padding_idx=0), nn.Embedding(4, 2, max_norm=1.0),
        nn.Embedding(4, 2).bfloat16(), nn.Embedding(4, 2).requires_grad_(False), nn.Embedding(4, 2, device="meta"),
    ):  # fmt: skip
        assert embedding_gradient.plain_embedding(Part(other)) is None
    assert embedding_gradient.plain_embedding(Part(nn.Embedding(4, 2))) is not None
