"""A step shared by real processes is the step of one process with the whole batch, however many there are."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.config import load_config
from cosup_fast.data.packing import PackLimits, make_batch
from cosup_fast.training.diagnostics import diagnose
from cosup_fast.training.held_out import HeldOutEvaluator
from tests.comparing import assert_equal
from tests.distributed.variants import VARIANTS, build

ONE_PACK, PACKS = PackLimits(), PackLimits(300, 2)


def in_one_process(model, examples, corpus):
    out = model(make_batch(examples, corpus, model.template))
    out.loss.backward()
    losses = {name: getattr(out, name).detach() for name in ("loss", "ntp", "nsp")}
    hits = 0 if out.stats is None else int((out.stats.rank == 0).sum())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | losses, hits


def check(world, settings, size, limits, examples, corpus, **options):
    expected, hits = in_one_process(build(settings), examples, corpus)
    answers = world.run("step", list(range(size)), settings, examples, corpus, tuple(limits), **options)
    for answer in answers:
        # transformers computes rotations in fp32
        assert_equal(answer["gradients"], expected, 1e-6)
        for name, x in answer["gradients"].items():
            assert torch.equal(x, answers[0]["gradients"][name])  # the same bits on every rank
    assert sum(answer["hits"] for answer in answers) == hits
    return answers


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_ranks_are_one_process(variant, small_world, settings, step_examples, corpus):
    answers = check(small_world, settings(variant), 3, PACKS, step_examples, corpus)
    assert max(answer["packs"] for answer in answers) > 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("limits", "recompute"), [(ONE_PACK, "none"), (PACKS, "full")], ids=["one pack", "packs"])
def test_ranks_that_share_out_the_weights_are_one_process(
    variant, limits, recompute, small_world, settings, step_examples, corpus
):
    """Also where they have unequal numbers of packs, which others fill up with empty ones."""
    options = {"sharded": True, "recompute": recompute}
    check(small_world, settings(variant), 3, limits, step_examples, corpus, **options)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("limits", [ONE_PACK, PACKS], ids=["one pack", "packs"])
def test_any_number_of_ranks_is_one_process(size, limits, small_world, settings, step_examples, corpus):
    check(small_world, settings("pair"), size, limits, step_examples, corpus)


def test_ranks_with_nothing_take_part(small_world, settings, step_examples, corpus):
    """More ranks than examples, ranks without queries, and steps in which nobody asks."""
    one, silent = step_examples[0], step_examples[4]
    for chosen in ([one], [one, silent], [silent], [silent, silent.model_copy(update={"id": "other"})]):
        check(small_world, settings("projected, learnt temperature"), 3, ONE_PACK, chosen, corpus)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_ranks_are_one_process(variant, make_world, settings, step_examples, corpus):
    check(make_world(8), settings(variant), 8, PACKS, step_examples, corpus)


def test_each_passage_is_encoded_by_one_rank_and_tokens_are_shared_evenly(small_world, settings, examples, corpus):
    many = [e.model_copy(update={"id": f"{e.id}-{i}"}) for i in range(6) for e in examples]
    answers = small_world.run("step", [0, 1, 2, 3], settings("pair"), many, corpus, tuple(ONE_PACK))
    encoded = [passage for answer in answers for passage in answer["passages"]]
    assert len(encoded) == len(set(encoded)) == answers[0]["step"].passages
    tokens = [answer["tokens"] for answer in answers]
    assert sum(tokens) == answers[0]["step"].tokens
    assert max(tokens) < 1.1 * min(tokens)


def test_local_gradients_of_keys_differ_in_embseq_alone(small_world, settings, step_examples, corpus):
    expected, _ = in_one_process(build(settings("pair")), step_examples, corpus)
    arguments = (settings("pair"), step_examples, corpus, tuple(PACKS))
    for answer in small_world.run("step", [0, 1], *arguments, key_grad="local"):
        ours = answer["gradients"]
        gen, embseq = ([n for n in expected if n.startswith(f"{part}.")] for part in ("gen", "embseq"))
        assert_equal({n: ours[n] for n in gen}, {n: expected[n] for n in gen}, 1e-6)
        with pytest.raises(AssertionError):
            assert_equal({n: ours[n] for n in embseq}, {n: expected[n] for n in embseq}, 1e-3)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shared out"])
@pytest.mark.parametrize("variant", ["pair", "shared"])
def test_a_diagnosis_is_that_of_the_whole_step(variant, sharded, small_world, settings, step_examples, corpus):
    model = build(settings(variant))
    expected = diagnose(model, make_batch(step_examples, corpus, model.template), 7, precision="float32")
    arguments = (settings(variant), step_examples, corpus, tuple(PACKS), sharded)
    for found in small_world.run("diagnosis", [0, 1, 2], *arguments):
        assert vars(found) == pytest.approx(vars(expected), rel=1e-6)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shared out"])
@pytest.mark.parametrize("variant", ["pair", "shared", "no NSP", "no NTP"])
def test_held_out_figures_are_those_of_one_process(variant, sharded, small_world, settings, examples, corpus):
    """Each rank does a part of the work, however unequal the parts are."""
    weight = VARIANTS[variant].get("nsp", {}).get("weight", 1.0)
    config = load_config(None, ["training.batch_size=2", "data.dev_pool=9", f"nsp.weight={weight}"])
    expected = HeldOutEvaluator(examples, corpus, config)(build(settings(variant)), 7)
    answers = small_world.run("held_out", [0, 1, 2], settings(variant), examples, corpus, config, sharded)
    there = {name: x for name, x in vars(expected).items() if x is not None}
    for found, _ in answers:
        assert {name: x for name, x in vars(found).items() if x is not None} == pytest.approx(there, rel=1e-6)
    assert expected.ntp > 0
    if weight == 0:
        assert there.keys() == {"step", "ntp"}
        return
    assert 0 < expected.recall_at_5 <= 1
    tokens = [n for _, n in answers]
    assert max(tokens) < 0.6 * sum(tokens)


@pytest.mark.parametrize("what", ["", "configuration", "data"])
def test_ranks_that_would_train_something_else_are_refused(what, small_world):
    plain = {"configuration": {"seed": 0}, "data": {"training": "a"}}
    found = small_world.run("same_run", [plain, plain, plain | ({what: {}} if what else {})])
    assert all(bool(message) == bool(what) for message in found)
    assert not what or f"rank 2 has another {what} than rank 0" in found[0]
