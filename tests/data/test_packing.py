"""Packs and batches: what is laid where, who is whose negative, and how a step is cut."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cosup_fast.data.packing import (
    CoSupervisionBatch,
    Pack,
    PackLimits,
    StepCounts,
    make_batch,
    plan_packs,
    share_out,
)
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.data.template import IGNORE

limits = st.builds(PackLimits, st.none() | st.integers(60, 200), st.none() | st.integers(1, 9))
lengths = st.lists(st.integers(1, 60), max_size=40)


def split(pack: Pack, values=None) -> list[list[int]]:
    """The tokens of each sequence, filler left out, or other values of theirs."""
    pieces = (pack.input_ids if values is None else values).split(pack.lengths)
    return [piece.tolist() for piece in pieces[: pack.count]]


def gen_sequences(batch: CoSupervisionBatch) -> list[list[int]]:
    return [ids for part in batch.gen for ids in split(part.pack)]


def encoded_passages(batch: CoSupervisionBatch) -> list[list[int]]:
    return [ids for pack in batch.passages for ids in split(pack)]


@given(st.lists(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=7), min_size=1, max_size=6))
def test_pack_keeps_the_sequences(sequences):
    pack = Pack.of(sequences)
    starts = pack.cu_seqlens.tolist()
    assert pack.cu_seqlens.dtype == torch.int32
    assert pack.lengths == tuple(map(len, sequences))
    for i, sequence in enumerate(sequences):
        piece = slice(starts[i], starts[i + 1])
        assert pack.input_ids[piece].tolist() == sequence
        assert pack.position_ids[piece].tolist() == list(range(len(sequence)))
        assert int(pack.input_ids[pack.last_rows[i]]) == sequence[-1]
    assert starts[-1] == len(pack.input_ids) == len(pack.position_ids)


@pytest.mark.parametrize("sequences", [[], [[]], [[1], []]])
def test_pack_refuses_nothing(sequences):
    with pytest.raises(ValueError, match="at least one token"):
        Pack.of(sequences)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=6), st.integers(0, 50))
def test_a_fixed_size_is_filled_behind_the_sequences(sequences, more):
    pack, plain = Pack.of(sequences, sum(map(len, sequences)) + more), Pack.of(sequences)
    assert len(pack.input_ids) == len(pack.position_ids) == sum(pack.lengths) == plain.tokens + more
    assert split(pack) == sequences
    assert torch.equal(pack.last_rows, plain.last_rows)
    assert pack.tokens == plain.tokens
    assert max(pack.lengths) == max(plain.lengths)
    assert pack.position_ids.max() < max(plain.lengths)
    assert pack.cu_seqlens.diff().tolist() == list(pack.lengths)


def test_a_pack_of_a_fixed_size_refuses_more():
    with pytest.raises(ValueError, match="size=4 tokens cannot hold 5"):
        Pack.of([[1, 2], [3, 4, 5]], 4)


@given(lengths, limits)
@example([10, 10, 1, 1, 1, 1], PackLimits(sequences=2))  # a pack that is full of short ones stays the emptiest
def test_a_plan_holds_everything_once_within_its_limits(lengths, limits):
    plan = plan_packs(lengths, limits)
    assert sorted(i for pack in plan for i in pack) == list(range(len(lengths)))
    for pack in plan:
        assert pack
        assert sum(lengths[i] for i in pack) <= (limits.tokens or 1 << 40)
        assert len(pack) <= (limits.sequences or 1 << 40)
        assert [lengths[i] for i in pack] == sorted((lengths[i] for i in pack), reverse=True)
    assert plan == plan_packs(lengths, limits)


@given(lengths)
def test_packs_are_few_and_even(lengths):
    """At most a sequence's length apart, or as full as first-fit decreasing leaves them: all but one over half."""
    used = sorted(sum(lengths[i] for i in pack) for pack in plan_packs(lengths, PackLimits(100)))
    assert not used or used[-1] - used[0] <= 60 or all(2 * tokens > 100 for tokens in used[1:])
    counts = [len(pack) for pack in plan_packs(lengths, PackLimits(sequences=7))]
    assert len(counts) == -(-len(lengths) // 7)


def test_packs_that_are_full_are_made_even_too():
    """First-fit decreasing alone would have put the two longest together."""
    assert plan_packs([3, 3, 2, 2, 1, 1], PackLimits(6)) == [[0, 2, 4], [1, 3, 5]]


def test_the_longest_is_handed_out_first():
    assert share_out([1, 1, 1, 9, 1, 1], 2) == [[3], [0, 1, 2, 4, 5]]


def test_packs_of_each_model_are_as_many_on_every_rank(model, corpus):
    examples = [ask(str(i), "paris") for i in range(4)]
    for rank in range(2):
        batch = make_batch(examples, corpus, model.template, PackLimits(sequences=1), rank=rank, ranks=2, even=True)
        assert (len(batch.gen), len(batch.passages)) == (2, 1)


def test_a_batch_is_its_sequences_end_to_end_the_longest_first(model, examples, corpus):
    batch = make_batch(examples, corpus, model.template)
    sequences = [model.template.gen_sequence(example, corpus) for example in examples]
    sequences.sort(key=lambda s: -len(s.input_ids))
    (part,) = batch.gen
    assert split(part.pack) == [s.input_ids for s in sequences]
    labels = torch.full_like(part.pack.input_ids, IGNORE)
    labels[part.supervised_rows] = part.targets
    assert split(part.pack, labels) == [s.labels for s in sequences]
    assert (part.pack.input_ids[part.query_rows] == model.template.nsp).all()
    assert batch.nsp_count == len(part.query_rows) == sum(len(s.query_rows) for s in sequences) == 6
    assert batch.ntp_count == len(part.supervised_rows) == sum(label != IGNORE for s in sequences for label in s.labels)
    assert batch.tokens == sum(len(ids) for ids in gen_sequences(batch) + encoded_passages(batch))


def test_labels_are_the_next_token_of_the_same_sequence(model, examples, corpus):
    (part,) = make_batch(examples, corpus, model.template).gen
    assert not torch.isin(part.supervised_rows, part.pack.last_rows).any()
    assert torch.equal(part.targets, part.pack.input_ids[part.supervised_rows + 1])


@pytest.mark.parametrize("limits", [PackLimits(), PackLimits(250), PackLimits(sequences=2)])
def test_no_pad_token_is_anywhere(limits, model, examples, corpus):
    batch = make_batch(examples, corpus, model.template, limits)
    for pack in batch.packs:
        assert (pack.input_ids != model.template.pad).all()
        assert pack.count == len(pack.lengths)
    assert batch.tokens == sum(len(pack.input_ids) for pack in batch.packs)


@pytest.mark.parametrize(
    "limits", [PackLimits(250), PackLimits(250, fixed=True), PackLimits(None, 1), PackLimits(400, 3)]
)
def test_a_batch_in_packs_is_the_same_batch(limits, model, examples, corpus):
    whole = make_batch(examples, corpus, model.template)
    batch = make_batch(examples, corpus, model.template, limits)
    assert len(batch.gen) > 1
    assert sorted(gen_sequences(batch)) == sorted(gen_sequences(whole))
    assert sorted(encoded_passages(batch)) == sorted(encoded_passages(whole))

    def asked(batch):
        """Each query's sequence up to its [NSP], and the passage that answers it."""
        passages = encoded_passages(batch)
        prefixes = []
        for part in batch.gen:
            for ids in split(part.pack):
                prefixes += [tuple(ids[: at + 1]) for at, token in enumerate(ids) if token == model.template.nsp]
        return dict(zip(prefixes, (passages[row] for row in batch.positive), strict=True))

    assert asked(batch) == asked(whole)
    assert (batch.ntp_count, batch.nsp_count, batch.tokens) == (whole.ntp_count, whole.nsp_count, whole.tokens)
    for pack in batch.packs:
        assert pack.tokens <= (limits.tokens or 1 << 40)
        assert not limits.fixed or len(pack.input_ids) == limits.tokens
        assert pack.count <= (limits.sequences or 1 << 40)


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_ranks_share_a_batch(data, model, examples, corpus):
    """Every sequence and passage once, each passage with a rank that names it; positives count over all ranks."""
    hard = Example(id="hard", question="?", output=[Segment(text="a", passage="rome")], negatives=["seine", "nile"])
    chosen = data.draw(st.lists(st.sampled_from([*examples, hard]), min_size=1, max_size=7))
    ranks = data.draw(st.integers(1, 4))
    cut = data.draw(st.sampled_from([PackLimits(), PackLimits(250), PackLimits(sequences=2)]))
    whole = make_batch(chosen, corpus, model.template)
    parts = [make_batch(chosen, corpus, model.template, cut, rank=rank, ranks=ranks) for rank in range(ranks)]
    passages = [p for part in parts for p in encoded_passages(part)]
    assert sorted(s for part in parts for s in gen_sequences(part)) == sorted(gen_sequences(whole))
    assert sorted(passages) == sorted(encoded_passages(whole))
    assert all(part.step == whole.step for part in parts)
    assert whole.step == StepCounts(whole.ntp_count, whole.nsp_count, len(whole.key_ids), whole.tokens)

    def asked(batch, passages):
        """The passage that answers each query, by the [NSP] of the sequence that asks."""
        nsp = [(tuple(ids), at) for ids in gen_sequences(batch) for at, t in enumerate(ids) if t == model.template.nsp]
        ids = batch.positive_ids
        further = [set()] * len(nsp) if ids is None else [set(row) - {-1} for row in ids.tolist()]
        return [(*q, passages[p], tuple(sorted(f))) for q, p, f in zip(nsp, batch.positive, further, strict=True)]

    ours = [one for part in parts for one in asked(part, passages)]
    assert sorted(ours) == sorted(asked(whole, encoded_passages(whole)))
    by_text = {tuple(model.template.sequence(p)): p.id for p in corpus.values()}
    for part in parts:
        sequences = list(map(tuple, gen_sequences(part)))
        own = [e for e in chosen if tuple(model.template.gen_sequence(e, corpus).input_ids) in sequences]
        named = {name for e in own for name in (*e.cited, *e.negatives)}
        assert {by_text[tuple(p)] for p in encoded_passages(part)} <= named


@given(lengths, st.integers(1, 5))
def test_shares_are_even(lengths, ranks):
    shares = share_out(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@pytest.mark.parametrize(("size", "what"), [(60, "example 'e2'"), (8, "example 'e1'")])
def test_a_sequence_longer_than_a_pack_is_named(size, what, model, examples, corpus):
    with pytest.raises(ValueError, match=rf"{what} has \d+ tokens, more than the {size} of a micro-batch: raise"):
        make_batch(examples[1:2] if size == 60 else examples, corpus, model.template, PackLimits(size))


def test_a_passage_longer_than_a_pack_is_named(model, corpus, monkeypatch):
    asking = ask("x", "long")
    size = len(model.template.gen_sequence(asking, corpus).input_ids)
    make_batch([asking], corpus, model.template, PackLimits(size))
    monkeypatch.setattr(model.template, "sequence", lambda passage: [7] * (size + 1))
    with pytest.raises(ValueError, match=rf"passage 'long' has {size + 1} tokens, more than the {size} of a micro"):
        make_batch([asking], corpus, model.template, PackLimits(size))


def test_a_passage_asked_for_twice_is_encoded_once(model, examples, corpus):
    batch = make_batch(examples, corpus, model.template)
    encoded = encoded_passages(batch)
    by_length = sorted(examples, key=lambda e: -len(model.template.gen_sequence(e, corpus).input_ids))
    asked = [s.passage for e in by_length for s in e.output if s.passage]
    assert sorted(asked) == ["go", "go", "paris", "paris", "rome", "seine"]
    assert len(encoded) == len(set(batch.key_ids.tolist())) == 4
    assert [encoded[row] for row in batch.positive.tolist()] == [model.template.sequence(corpus[p]) for p in asked]


def ask(name: str, *passages: str, gold: list[str] | None = None) -> Example:
    output = [Segment(text="It is so.", passage=passage) for passage in passages]
    return Example(id=name, question=f"{name}?", output=output, gold=gold or [])


def test_the_same_text_under_another_id_is_encoded_once(make_model, corpus):
    model = make_model(text={"max_passage_tokens": 12, "long_passages": "truncate"})
    twin = corpus["paris"].model_copy(update={"id": "twin"})
    longer = Passage(id="longer", title="Long", text=corpus["long"].text + "eleven")  # cut to the same tokens
    known = {**corpus, "twin": twin, "longer": longer}
    batch = make_batch([ask("a", "paris", "rome"), ask("b", "twin", "long", "longer")], known, model.template)
    encoded = encoded_passages(batch)
    assert sorted(encoded) == sorted(model.template.sequence(corpus[name]) for name in ("paris", "rome", "long"))
    asked = ["paris", "long", "long", "paris", "rome"]  # the longer example comes first
    assert [encoded[row] for row in batch.positive] == [model.template.sequence(corpus[name]) for name in asked]
    assert batch.positive_ids is None


def test_the_same_text_under_another_title_is_another_passage(model, corpus):
    other = corpus["paris"].model_copy(update={"id": "other", "title": "Lutetia"})
    batch = make_batch([ask("a", "paris"), ask("b", "other")], {**corpus, "other": other}, model.template)
    encoded = encoded_passages(batch)
    asked = [encoded[row] for row in batch.positive]
    assert sorted(asked) == sorted(model.template.sequence(passage) for passage in (corpus["paris"], other))
    assert batch.positive_ids is None


def test_golds_that_another_example_asks_for_are_positives(model, corpus):
    twin = corpus["seine"].model_copy(update={"id": "twin"})
    examples = [
        ask("both asked", "paris", "rome", gold=["paris", "rome"]),
        ask("one asked", "rome", gold=["seine", "rome", "nowhere", "nile"]),
        ask("by its text", "go", "rome", gold=["twin", "paris"]),
        ask("other", "seine"),
        ask("asked by its text", "seine", "go", gold=["twin", "go"]),
    ]
    expected = {
        "both asked": [("paris", set()), ("rome", set())],
        "one asked": [("rome", {"seine"})],
        "by its text": [("go", {"paris", "seine"}), ("rome", {"paris", "seine"})],
        "other": [("seine", set())],
        "asked by its text": [("seine", set()), ("go", set())],
    }
    for limits in (PackLimits(), PackLimits(sequences=2)):
        batch = make_batch(examples, {**corpus, "twin": twin}, model.template, limits)
        name_of = {tuple(model.template.sequence(corpus[name])): name for name in ("paris", "rome", "go", "seine")}
        names = [name_of[tuple(ids)] for ids in encoded_passages(batch)]
        by_id = dict(zip(batch.key_ids.tolist(), names, strict=True))
        of_sequence = {
            tuple(model.template.gen_sequence(e, {**corpus, "twin": twin}).input_ids): e.id for e in examples
        }
        wanted = [pair for ids in gen_sequences(batch) for pair in expected[of_sequence[tuple(ids)]]]
        further = [{by_id[i] for i in row if i >= 0} for row in batch.positive_ids.tolist()]
        assert list(zip((names[row] for row in batch.positive), further, strict=True)) == wanted
    assert make_batch(examples[:1], corpus, model.template).positive_ids is None


def test_ids_of_passages_are_those_of_their_tokens(model, examples, corpus):
    """In any batch, and in any process: a step over several asks whether two of them hold the same passage."""
    found = {}
    for chosen in (examples, examples[::-1], examples[:1], [ask("x", "paris")]):
        batch = make_batch(chosen, corpus, model.template)
        for ids, name in zip(encoded_passages(batch), batch.key_ids.tolist(), strict=True):
            assert found.setdefault(tuple(ids), name) == name >= 0
    assert len(set(found.values())) == 4
    script = "from cosup_fast.data import packing; import sys; print(packing.content_id(map(int, sys.argv[1:])))"
    ids, name = next(iter(found.items()))
    other = subprocess.run([sys.executable, "-c", script, *map(str, ids)], capture_output=True, text=True, check=True)
    assert int(other.stdout) == name


def test_hard_negatives_are_encoded_once_beside_what_is_asked_for(model, corpus):
    twin = corpus["rome"].model_copy(update={"id": "twin"})
    known = {**corpus, "twin": twin}
    first = ask("first", "paris").model_copy(update={"negatives": ["seine", "nile", "twin"]})
    second = ask("second", "rome", gold=["rome", "seine"]).model_copy(update={"negatives": ["nile", "paris"]})
    batch = make_batch([first, second], known, model.template)
    encoded = encoded_passages(batch)
    # rome under another id, nile and paris again are there already.
    rows = {name: encoded.index(model.template.sequence(corpus[name])) for name in ("paris", "rome", "seine", "nile")}
    assert sorted(rows.values()) == list(range(len(encoded)))
    assert set(batch.positive.tolist()) == {rows["paris"], rows["rome"]}
    # What is a negative of the first is gold for the second, and stays a positive of it.
    seine = int(batch.key_ids[rows["seine"]])
    further = {int(p): ids for p, ids in zip(batch.positive, batch.positive_ids.tolist(), strict=True)}
    assert further == {rows["paris"]: [-1], rows["rome"]: [seine]}
    nothing_asked = Example(id="x", question="?", output=[Segment(text="a")], negatives=["nile"])
    assert make_batch([nothing_asked], corpus, model.template).passages == ()


def test_batch_without_retrieval_has_no_passages(model, corpus):
    batch = make_batch([Example(id="x", question="?", output=[Segment(text="a")])], corpus, model.template)
    assert batch.passages == ()
    for empty in (batch.gen[0].query_rows, batch.positive, batch.key_ids):
        assert empty.dtype == torch.int64
        assert len(empty) == 0
    assert batch.to(torch.device("cpu")).passages == ()


def test_a_gen_alone_reads_the_passages_and_nobody_is_asked(model, examples, corpus):
    alone, both = (make_batch(examples, corpus, model.template, retrieval=kind) for kind in (False, True))
    assert alone.passages == ()
    assert (alone.step.nsp, alone.step.passages, alone.step.ntp) == (0, 0, both.step.ntp)
    for mine, theirs in zip(alone.gen, both.gen, strict=True):
        assert torch.equal(mine.pack.input_ids, theirs.pack.input_ids)
        assert torch.equal(mine.targets, theirs.targets)
        assert len(mine.query_rows) == 0


def test_questions_with_gold_alone_are_contrasted(model, corpus):
    asks = [Example(id=name, question=f"{name}?", output=[], gold=[name]) for name in ("paris", "rome", "go")]
    batch = make_batch(asks, corpus, model.template)
    assert (batch.step.nsp, batch.step.passages) == (3, 3)
    out = model(batch)
    assert len(out.stats.rank) == 3


def test_to_moves_every_tensor(model, examples, corpus):
    further = [ask("x", "paris", gold=["seine"])]
    moved = make_batch([*examples, *further], corpus, model.template, PackLimits(250)).to(torch.device("meta"))
    assert moved.positive_ids is not None
    records = [moved, *moved.gen, *moved.packs]
    for tensor in (value for record in records for value in vars(record).values()):
        assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta"


def test_empty_batch_is_refused(model, corpus):
    with pytest.raises(ValueError, match="at least one example"):
        make_batch([], corpus, model.template)
