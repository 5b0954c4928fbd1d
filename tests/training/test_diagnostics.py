"""Gradients of each loss, their angle, alignment and uniformity: against what they are by hand, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from cosup_fast.data.packing import PackLimits, make_batch
from cosup_fast.training.diagnostics import diagnose, uniformity
from cosup_fast.training.step import accumulate_gradients

VARIANTS = {
    "pair": {},
    "shared": {"shared": True},
    "projected": {"embseq": "gpt2", "nsp": {"similarity": "dot", "temperature": 8.0, "weight": 0.3}},
    "frozen": {"freeze_embseq": True, "nsp": {"learnable_temperature": True}},
}


def _gradient(model, loss) -> torch.Tensor:
    """Of all of Gen, as one vector."""
    parameters = list(model.gen.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


@pytest.mark.parametrize("cut", [PackLimits(), PackLimits(300, 2, fixed=True)], ids=["one pack", "packs"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_figures_are_those_computed_by_hand(variant, cut, make_model, examples, corpus):
    model = make_model(dtype="float64", **VARIANTS[variant])
    whole = make_batch(examples, corpus, model.template)
    found = diagnose(model, make_batch(examples, corpus, model.template, cut), 7, precision="float32")
    out = model(whole)
    ntp, nsp = _gradient(model, out.ntp), _gradient(model, model.nsp.weight * out.nsp)
    assert found.step == 7
    assert found.ntp_grad_norm == pytest.approx(float(ntp.norm()), rel=1e-6)
    assert found.nsp_grad_norm == pytest.approx(float(nsp.norm()), rel=1e-6)
    assert found.grad_cosine == pytest.approx(float(cosine_similarity(ntp, nsp, dim=0)), rel=1e-5, abs=1e-9)
    with torch.no_grad():
        query = model.query_embeddings(whole.gen[0].pack, whole.gen[0].query_rows)
        keys = model.embed(whole.passages[0])
        q, k = (x / x.norm(dim=1, keepdim=True) for x in (query, keys))
    distances = [float(((a - k[i]) ** 2).sum()) for a, i in zip(q, whole.positive.tolist(), strict=True)]
    assert found.alignment == pytest.approx(sum(distances) / len(distances), rel=1e-6)
    for x, ours in ((q, found.query_uniformity), (k, found.passage_uniformity)):
        pairs = [torch.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i in range(len(x)) for j in range(i)]
        assert ours == pytest.approx(float((sum(pairs) / len(pairs)).log()), rel=1e-6)


def test_the_parts_add_up_to_the_gradient_of_the_step(make_model, examples, corpus):
    """|g|^2 = |g_NTP|^2 + |g_NSP|^2 + 2 g_NTP . g_NSP"""
    model = make_model(dtype="float64", **VARIANTS["shared"])
    batch = make_batch(examples, corpus, model.template)
    found = diagnose(model, batch, 1, precision="float32")
    accumulate_gradients(model, batch)
    total = sum(float(p.grad.square().sum()) for p in model.gen.parameters() if p.grad is not None)
    a, b = found.ntp_grad_norm, found.nsp_grad_norm
    assert a * a + b * b + 2 * a * b * found.grad_cosine == pytest.approx(total, rel=1e-6)
    model.zero_grad()


def test_nothing_is_left_behind_and_dropout_is_the_same_in_both_passes(make_model, gpt2_folder, examples, corpus):
    model = make_model(gen=gpt2_folder, embseq=gpt2_folder).train()
    batch = make_batch(examples, corpus, model.template, PackLimits(sequences=2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = diagnose(model, batch, 1, precision="float32")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert diagnose(model, batch, 1, precision="float32") == first
    torch.manual_seed(6)
    assert diagnose(model, batch, 1, precision="float32") != first


def test_what_a_batch_does_not_have_is_none(model, examples, corpus):
    one = make_batch(examples[:1], corpus, model.template)
    found = diagnose(model, one, 1, precision="float32")
    assert (found.query_uniformity, found.passage_uniformity) == (None, None)
    assert found.ntp_grad_norm > 0
    assert found.nsp_grad_norm == 0  # one passage is nothing to contrast with
    assert 0 < found.alignment < 4


@pytest.mark.parametrize("alone", ["ntp", "nsp"])
def test_a_loss_without_weight_has_no_gradient(alone, make_model, examples, corpus):
    model = make_model(**{{"ntp": "nsp", "nsp": "ntp"}[alone]: {"weight": 0.0}})
    batch = make_batch(examples, corpus, model.template, retrieval=alone == "nsp")
    found = diagnose(model, batch, 1, precision="float32")
    norms = {"ntp": found.ntp_grad_norm, "nsp": found.nsp_grad_norm}
    assert norms.pop(alone) > 0
    assert set(norms.values()) == {found.grad_cosine} == {None}
    assert (found.alignment is None) == (alone == "ntp")


def test_weights_scale_their_gradients(make_model, examples, corpus):
    plain, weighted = make_model(), make_model(ntp={"weight": 0.25}, nsp={"weight": 3.0})
    batch = make_batch(examples, corpus, plain.template)
    one = diagnose(plain, batch, 1, precision="float32")
    other = diagnose(weighted, batch, 1, precision="float32", nsp_weight=2.0)
    assert other.ntp_grad_norm == pytest.approx(0.25 * one.ntp_grad_norm, rel=1e-5)
    assert other.nsp_grad_norm == pytest.approx(2 * one.nsp_grad_norm, rel=1e-5)
    assert other.grad_cosine == pytest.approx(one.grad_cosine, abs=1e-5)


def test_uniformity_of_a_collapse_is_zero_and_of_opposites_is_low():
    assert uniformity(torch.ones(3, 1)) == pytest.approx(0.0)
    assert uniformity(torch.tensor([[1.0], [-1.0]])) == pytest.approx(-8.0)
