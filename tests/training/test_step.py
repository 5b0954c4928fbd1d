"""A step in packs has the gradients of the step in one piece, and runs no forward that nobody reads."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosup_fast.data.packing import PackLimits, make_batch
from cosup_fast.model.backbone import norm_rows
from cosup_fast.training.step import accumulate_gradients
from tests.comparing import assert_equal

VARIANTS = {
    "pair": {},
    "shared": {"shared": True},
    "projected": {"embseq": "gpt2"},
    "frozen": {"freeze_embseq": True},
    "frozen, projected": {"embseq": "gpt2", "freeze_embseq": True},
    "learnt temperature": {"nsp": {"learnable_temperature": True, "temperature": 0.5}},
    "symmetric": {"nsp": {"symmetric": True, "label_smoothing": 0.1}},
    "dot": {"nsp": {"similarity": "dot", "temperature": 8.0, "weight": 0.3}, "shared": True},
    "no NSP": {"nsp": {"weight": 0.0}},
    "no NTP": {"ntp": {"weight": 0.0}},
    "weighted": {"ntp": {"weight": 0.3}, "nsp": {"weight": 2.0}},
    "checkpointed": {"nsp": {"learnable_temperature": True}},
    "labelled passages": {"text": {"label_passages": True}},
}
LIMITS = [PackLimits(sequences=1), PackLimits(300, 2, fixed=True)]
limits = st.builds(PackLimits, st.none() | st.integers(240, 500), st.none() | st.integers(1, 5), st.just(False))


@pytest.fixture(scope="module")
def made(make_model):
    @cache
    def make(variant: str, dtype: str = "float64"):
        model = make_model(dtype=dtype, **VARIANTS[variant])
        if variant == "checkpointed":
            model.enable_activation_checkpointing()
            model.train()  # without dropout
        return model

    return make


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """What `loss()` leaves in the parameters, and its losses."""
    model.zero_grad(set_to_none=True)
    out = loss()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found | {name: getattr(out, name).detach() for name in ("loss", "ntp", "nsp")}


def in_one_piece(model, batch):
    def loss():
        out = model(batch)
        out.loss.backward()
        return out

    return gradients(model, loss)


def in_packs(model, batch, **options):
    return gradients(model, lambda: accumulate_gradients(model, batch, **options))


@pytest.mark.parametrize("cut", LIMITS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_one_piece(variant, cut, made, mixed, corpus):
    model = made(variant)
    whole, packs = (make_batch(mixed, corpus, model.template, limits) for limits in (PackLimits(), cut))
    assert len(packs.gen) > 1
    assert len(packs.passages) > 1
    # transformers computes rotations in fp32
    assert_equal(in_packs(model, packs), in_one_piece(model, whole), 1e-6)


@given(data=st.data(), cut=limits, variant=st.sampled_from(sorted(VARIANTS)))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_split_of_any_batch(data, cut, variant, made, mixed, corpus):
    model = made(variant, "float32")
    chosen = data.draw(st.lists(st.sampled_from(mixed), min_size=1, max_size=9))
    whole, packs = (make_batch(chosen, corpus, model.template, limits) for limits in (PackLimits(), cut))
    assert_equal(in_packs(model, packs), in_one_piece(model, whole), 3e-5)


def test_counts_of_a_larger_step(made, mixed, corpus):
    """Sums divided by what the caller says, so that ranks add up."""
    model = made("pair")
    batch = make_batch(mixed, corpus, model.template, PackLimits(300))
    plain = in_packs(model, batch)
    double = in_packs(model, batch, ntp_count=2 * batch.ntp_count, nsp_count=2 * batch.nsp_count)
    assert_equal({name: 2 * x for name, x in double.items()}, plain, 1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_same_in_both_passes(checkpointing, make_model, gpt2_folder, examples, corpus):
    model = make_model(gen=gpt2_folder, embseq=gpt2_folder, dtype="float64").train()
    if checkpointing:
        model.enable_activation_checkpointing()
    batch = make_batch(examples * 2, corpus, model.template, PackLimits(300, 2))
    assert len(batch.gen) > 2
    assert len(batch.passages) == 2
    results = []
    for run in (in_packs, in_one_piece, in_one_piece):
        torch.manual_seed(len(results) // 2)
        results.append((run(model, batch), torch.get_rng_state()))
    (ours, ours_after), (expected, expected_after), (other, _) = results
    assert_equal(ours, expected, 1e-7)
    assert torch.equal(ours_after, expected_after)  # the next step draws new numbers
    with pytest.raises(AssertionError):
        assert_equal(ours, other, 1e-3)


def test_bfloat16_reaches_every_weight(made, examples, corpus):
    """Autocast's copies of weights made without a graph in pass 1 are not those of pass 3."""
    model = made("pair", "float32")
    batch = make_batch(examples, corpus, model.template, PackLimits(sequences=1))
    ours, exact = in_packs(model, batch, precision="bfloat16"), in_one_piece(model, batch)
    assert ours.keys() == exact.keys()
    for name, b in exact.items():
        assert torch.nn.functional.cosine_similarity(ours[name].flatten(), b.flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nsp_has_the_precision_of_the_step(precision, made, examples, corpus, monkeypatch):
    model, seen = made("pair", "float32"), []
    loss = model.nsp_loss

    def watched(*args, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(*args, **options)

    monkeypatch.setattr(model, "nsp_loss", watched)
    in_packs(model, make_batch(examples, corpus, model.template), precision=precision)
    assert seen == [precision == "bfloat16"]


@pytest.fixture
def forwards(made):
    """A function that runs a step and says, for Gen and Embseq, which forwards had a graph, in order."""

    def run(variant, batch):
        model = made(variant)
        seen = {"gen": [], "embseq": []}
        hooks = [
            part.register_forward_hook(lambda _, args, out, name=name: seen[name].append(out[0].requires_grad))
            for name, part in (("gen", model.gen.base_model), ("embseq", model.embseq))
            if part is not None
        ]
        try:
            in_packs(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    return run


def test_no_forward_runs_that_nobody_reads(forwards, made, mixed, corpus):
    template = made("pair").template

    def batch(chosen, cut):
        return make_batch(chosen, corpus, template, cut)

    one_each = PackLimits(sequences=1)
    assert forwards("pair", batch(mixed, PackLimits())) == {"gen": [True], "embseq": [True]}  # one pass
    # The last pack of each keeps its graph; the silent example has no first pass.
    both = {"gen": [False] * 4 + [True] + [True] * 5, "embseq": [False] * 5 + [True] + [True] * 5}
    assert forwards("pair", batch(mixed, one_each)) == both
    assert forwards("frozen", batch(mixed, one_each)) == {"gen": both["gen"], "embseq": [False] * 6}
    assert forwards("no NSP", batch(mixed, one_each)) == {"gen": [True] * 6, "embseq": []}
    # Without NTP the silent example has no pass at all.
    assert forwards("no NTP", batch(mixed, one_each)) == {"gen": [False] * 4 + [True] * 5, "embseq": both["embseq"]}
    silent = batch([mixed[4]] * 2, one_each)
    assert forwards("pair", silent) == {"gen": [True] * 2, "embseq": []}
    assert forwards("no NTP", silent) == {"gen": [], "embseq": []}


@pytest.mark.parametrize("alone", ["no NTP", "no NSP"])
def test_a_loss_without_weight_costs_nothing(alone, made, mixed, corpus, monkeypatch):
    """No supervised row is gathered and no product with the head is formed; no query is made and no passage read."""
    model = made(alone)
    batch = make_batch(mixed, corpus, model.template, PackLimits(sequences=2), retrieval=alone == "no NTP")
    gathered = []

    def counting(part, states, rows, *options, **more):
        gathered.extend([len(rows)] if part is model.gen.base_model else [])
        return norm_rows(part, states, rows, *options, **more)

    monkeypatch.setattr("cosup_fast.model.model.norm_rows", counting)
    monkeypatch.setattr(model, "ntp_loss" if alone == "no NTP" else "nsp_loss", None)
    found = in_packs(model, batch)
    assert found["ntp" if alone == "no NTP" else "nsp"] == 0
    read = {"no NTP": 2 * batch.step.nsp, "no NSP": batch.step.ntp}[alone]
    spared = sum(len(part.query_rows) for part in batch.gen if part is batch.gen[-1])  # its first pass is its only one
    assert sum(gathered) == read - spared
    if alone == "no NTP":
        assert not any(name.startswith("gen.lm_head") for name in found)


def test_lambda_of_a_step_scales_its_gradients(made, mixed, corpus):
    """As where it moves from `nsp.initial_weight` to `nsp.weight`, 0 included."""
    model = made("no NTP")
    batch = make_batch(mixed, corpus, model.template, PackLimits(300))
    whole, part, none = (in_packs(model, batch, nsp_weight=weight) for weight in (1.0, 0.25, 0.0))
    same = whole.pop("nsp")
    assert part.pop("nsp") == none.pop("nsp") == same
    assert_equal(part, {name: 0.25 * x for name, x in whole.items()}, 1e-9)
    assert all(not x.any() for x in none.values())


def test_only_rows_that_are_read_are_normalised(made, examples, corpus, monkeypatch):
    """The last norm of either model never runs as a module; the operator sees supervised, [NSP] and last rows alone."""
    from cosup_fast.model import backbone

    model, rows = made("pair"), []
    batch = make_batch(examples, corpus, model.template)
    for part in (model.gen.base_model, model.embseq):
        monkeypatch.setattr(part.norm, "forward", None)
    gather = backbone.gather_last_hidden

    def counted(hidden, index, **options):
        rows.append(len(index))
        assert options["norm_weight"] is not None
        return gather(hidden, index, **options)

    monkeypatch.setattr(backbone, "gather_last_hidden", counted)
    in_packs(model, batch)
    assert sorted(rows) == sorted([batch.ntp_count, batch.nsp_count, len(batch.key_ids)])
