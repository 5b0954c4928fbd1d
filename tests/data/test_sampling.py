"""The order of the examples: the seed decides, everything comes once an epoch, and steps are alike."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cosup_fast.data.packing import PackLimits
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.data.sampling import Mixture, StepSampler, draw_negatives, example_lengths


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(0, 5),
    st.booleans(),
)
def test_every_epoch_is_a_permutation(lengths, batch_size, seed, balanced):
    sampler = StepSampler(lengths, batch_size, seed, balanced=balanced)
    steps = sampler.steps_per_epoch
    assert steps == -(-len(lengths) // batch_size)
    for epoch in range(2):
        sizes = [len(sampler[epoch * steps + step]) for step in range(steps)]
        seen = [i for step in range(steps) for i in sampler[epoch * steps + step]]
        assert sorted(seen) == list(range(len(lengths)))
        assert 1 <= min(sizes) <= max(sizes) <= batch_size
        assert not balanced or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("balanced", [True, False])
def test_the_seed_and_the_step_alone_decide(balanced):
    lengths = torch.arange(1, 201).tolist()

    def order(seed, steps):
        sampler = StepSampler(lengths, 8, seed, balanced=balanced)
        return {step: sampler[step] for step in steps}

    forwards, backwards = order(3, range(60)), order(3, reversed(range(60)))
    assert forwards == backwards
    epochs = [tuple(i for step in range(25 * k, 25 * k + 25) for i in forwards[step]) for k in range(2)]
    assert epochs[0] != epochs[1]
    assert order(4, range(60)) != forwards


def test_steps_have_nearly_equal_tokens_and_equal_lengths_meet():
    lengths = (torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 5).exp().mul(20).long().tolist()
    spread = {}
    for balanced in (True, False):
        sampler = StepSampler(lengths, 40, 0, balanced=balanced)
        tokens = torch.tensor([sum(lengths[i] for i in sampler[step]) for step in range(50)]).double()
        spread[balanced] = float(tokens.std() / tokens.mean())
    assert spread[True] < 0.04 < 0.12 < spread[False]
    equal = set(sorted(range(2000), key=lambda i: lengths[i])[1000:1050])
    sampler = StepSampler(lengths, 40, 0)
    met = [equal & set(sampler[step]) for step in range(50 * 40)]
    pairs = {frozenset((a, b)) for group in met for a in group for b in group if a != b}
    assert len(pairs) > 0.4 * 50 * 49 / 2


def test_lengths_are_the_tokens_of_both_models(model, examples, corpus):
    template, shown = model.template, []

    def track(examples):
        for example in examples:
            shown.append(example)
            yield example

    found = example_lengths(examples, corpus, template, track=track)
    assert shown == examples
    for example, length in zip(examples, found, strict=True):
        asked = {s.passage for s in example.output if s.passage}
        passages = sum(len(template.sequence(corpus[name])) for name in asked)
        assert length == len(template.gen_sequence(example, corpus).input_ids) + passages


def test_hard_negatives_are_counted_and_checked(model, examples, corpus):
    plain = examples[0]
    hard = plain.model_copy(update={"negatives": ["nile", "long"]})
    known = corpus | {"long": Passage(id="long", title="Long", text="very " * 60)}
    more = sum(len(model.template.sequence(known[name])) for name in hard.negatives)
    (alone,), (together,) = (example_lengths([e], known, model.template) for e in (plain, hard))
    assert together == alone + more
    for drawn, read in ((0, 0), (1, more // 2), (2, more), (5, more)):
        assert example_lengths([hard], known, model.template, negatives=drawn) == [alone + read]
    with pytest.raises(ValueError, match=r"passage 'long' has \d+ tokens, more than the 200 of a micro-batch"):
        example_lengths([hard], known, model.template, PackLimits(200))


def test_what_does_not_fit_is_named(model, examples, corpus):
    with pytest.raises(ValueError, match=r"example 'e2' has 239 tokens, more than the 238 of a micro-batch"):
        example_lengths(examples, corpus, model.template, PackLimits(238))
    bad = Example(id="x", question="?", output=[Segment(text="a", passage="nowhere")])
    with pytest.raises(ValueError, match="unknown passage id 'nowhere'"):
        example_lengths([bad], corpus, model.template)


def test_a_set_without_a_supervised_token_is_refused(model, corpus, monkeypatch):
    make = model.template.gen_sequence

    def silent(example, passages):
        sequence = make(example, passages)
        return type(sequence)(sequence.input_ids, [-100] * len(sequence.labels), sequence.query_rows, [])

    monkeypatch.setattr(model.template, "gen_sequence", silent)
    examples = [Example(id=str(i), question="?", output=[]) for i in range(3)]
    with pytest.raises(ValueError, match=r"none of the 3 examples of data\.train has a supervised token"):
        example_lengths(examples, corpus, model.template, retrieval=False)
    with pytest.raises(ValueError, match=r"none of the 3 examples .* asks for a passage.* set nsp\.weight=0"):
        example_lengths(examples, corpus, model.template, ntp=False)


def test_a_gen_without_an_embseq_pays_for_no_passage(model, corpus, examples):
    both, alone = (example_lengths(examples, corpus, model.template, retrieval=kind) for kind in (True, False))
    passages = [{s.passage for s in e.output if s.passage} for e in examples]
    spared = [sum(len(model.template.sequence(corpus[name])) for name in names) for names in passages]
    assert [a - b for a, b in zip(both, alone, strict=True)] == spared
    silent = [Example(id="x", question="?", output=[Segment(text="a")])]
    assert example_lengths(silent, corpus, model.template, retrieval=False)


@pytest.mark.parametrize("balanced", [True, False])
def test_an_epoch_of_one_seed_is_not_one_of_the_next(balanced):
    """Seeds s and s + 1 must not share their data's order, shifted by an epoch."""
    lengths = list(range(20, 60))
    one, other = (StepSampler(lengths, 8, seed, balanced=balanced) for seed in (3, 4))
    second = [one[one.steps_per_epoch + i] for i in range(one.steps_per_epoch)]
    assert second != [other[i] for i in range(other.steps_per_epoch)]
    assert sorted(i for step in second for i in step) == list(range(40))


def test_a_mixture_deals_out_the_lengths_of_what_it_draws():
    sampler = StepSampler([10] * 20 + [1000] * 20, 4, 0, mixture=Mixture([0] * 20 + [1] * 20, [1, 3]))
    for step in range(2 * sampler.steps_per_epoch):
        assert sum(sampler.lengths[sampler[step]]) == 10 + 3 * 1000


def test_a_set_has_another_order_every_time_it_is_dealt_out():
    mixture = Mixture([0] * 12 + [1] * 12, [1, 1])
    one, other = (mixture.epoch(number, 0).view(2, 12) for number in range(2))
    assert torch.equal(one.sort().values, other.sort().values)
    assert (one != other).any(1).all()


def test_of_equal_remainders_the_first_set_gets_the_draw():
    assert Mixture([1, 0, 1], [1, 1]).draws == [2, 1]


def test_the_largest_remainder_gets_the_draw_that_is_left():
    assert Mixture([0] * 5 + [1] * 5, [14, 86]).draws == [1, 9]
    assert Mixture([0] * 5 + [1] * 5, [16, 84]).draws == [2, 8]


@st.composite
def mixtures(draw):
    """The set of every example in any order, and a weight for each set."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    sets = draw(st.permutations([i for i, size in enumerate(sizes) for _ in range(size)]))
    weights = draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    shares = [len(sets) * weight / sum(weights) for weight in weights]
    assume(min(shares) >= 1)
    return Mixture(sets, weights)


@given(mixtures(), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_weights_decide_what_an_epoch_draws_and_the_step_number_alone_where_it_is(mixture, batch_size, seed, balanced):
    """Shares are exact to one example, no example repeats before its whole set came, and any step can be the first."""
    count, epochs = len(mixture.sets), 4

    def sampler():
        return StepSampler([1 + i % 7 for i in range(count)], batch_size, seed, balanced=balanced, mixture=mixture)

    whole, steps = sampler(), sampler().steps_per_epoch
    assert steps == -(-count // batch_size)
    run = [whole[step] for step in range(epochs * steps)]
    total = sum(map(Fraction, mixture.weights))
    for epoch in range(epochs):
        drawn = [i for step in run[epoch * steps : (epoch + 1) * steps] for i in step]
        assert len(drawn) == count
        shares = Counter(mixture.sets[i] for i in drawn)
        for number, weight in enumerate(mixture.weights):
            assert shares[number] == mixture.draws[number]
            assert abs(shares[number] - count * Fraction(weight) / total) < 1 + Fraction(1, 10**9)
        assert sorted(drawn) == sorted(mixture.epoch(epoch, seed).tolist())
    for number in range(len(mixture.weights)):
        dealt = [i for e in range(epochs) for i in mixture.epoch(e, seed).tolist() if mixture.sets[i] == number]
        size = mixture.sets.count(number)
        for start in range(0, len(dealt) - size + 1, size):
            assert len(set(dealt[start : start + size])) == size
    for step in (0, steps - 1, steps, len(run) - 1):
        assert sampler()[step] == run[step]


def test_a_weight_that_draws_nothing_is_refused():
    with pytest.raises(ValueError, match=r"data\.weights=\[1, 1\]: set 1 of data\.train .* has no example"):
        Mixture([0, 0], [1, 1])
    with pytest.raises(ValueError, match=r"set 0 of data\.train .* gets less than one of the 3 examples"):
        Mixture([0, 1, 1], [0.01, 1])


def test_seed_step_and_id_draw_negatives(examples):
    hard = [e.model_copy(update={"negatives": [f"n{i}" for i in range(6)]}) for e in examples]
    drawn = {step: draw_negatives(hard, 2, 0, step) for step in range(50)}
    assert drawn[7] == draw_negatives(hard, 2, 0, 7) != draw_negatives(hard, 2, 1, 7)
    assert {len(set(e.negatives)) for found in drawn.values() for e in found} == {2}
    seen = Counter(name for found in drawn.values() for name in found[0].negatives)
    assert set(seen) == set(hard[0].negatives)
    assert len({tuple(e.negatives) for e in drawn[0]}) > 1
    assert draw_negatives(hard, None, 0, 0) == draw_negatives(hard, 6, 0, 0) == hard
    assert [e.negatives for e in draw_negatives(hard, 0, 0, 0)] == [[]] * len(hard)


def test_long_examples_are_collected_when_asked(model, examples, corpus):
    template = model.template
    lengths = example_lengths(examples, corpus, template)
    longest = max(len(template.gen_sequence(e, corpus).input_ids) for e in examples)
    limits, too_long = PackLimits(longest - 1), []
    found = example_lengths(examples, corpus, template, limits, too_long=too_long)
    assert 0 < found.count(0) == len(too_long) < len(examples)
    assert [n for n in found if n] == [n for n, kept in zip(lengths, found, strict=True) if kept]
    assert "more than the" in too_long[0]
    with pytest.raises(ValueError, match=r"all of the \d+ examples of data\.train are too long: example '\w+' has"):
        example_lengths(examples, corpus, template, PackLimits(1), too_long=[])
