from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosup_fast.data.packing import Pack, make_batch
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.data.template import IGNORE


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


def test_batch_is_its_sequences_end_to_end(model, examples, corpus):
    batch = make_batch(examples, corpus, model.template)
    sequences = [model.template.gen_sequence(example, corpus) for example in examples]
    assert batch.gen.input_ids.tolist() == [token for s in sequences for token in s.input_ids]
    assert batch.labels.tolist() == [label for s in sequences for label in s.labels]
    assert (batch.gen.input_ids[batch.query_rows] == model.template.nsp).all()
    assert len(batch.query_rows) == sum(len(s.query_rows) for s in sequences) == 6


def test_labels_are_the_next_token_of_the_same_sequence(model, examples, corpus):
    batch = make_batch(examples, corpus, model.template)
    assert (batch.labels[batch.gen.last_rows] == IGNORE).all()
    learned = (batch.labels != IGNORE).nonzero()[:, 0]
    assert (batch.labels[learned] == batch.gen.input_ids[learned + 1]).all()


def test_padding_is_nowhere(model, examples, corpus):
    batch = make_batch(examples, corpus, model.template)
    for ids in (batch.gen.input_ids, batch.labels, batch.passages.input_ids):
        assert (ids != model.template.pad).all()


def test_a_passage_asked_for_twice_is_encoded_once(model, examples, corpus):
    batch = make_batch(examples, corpus, model.template)
    starts = batch.passages.cu_seqlens.tolist()
    encoded = [batch.passages.input_ids[a:b].tolist() for a, b in pairwise(starts)]
    asked = ["paris", "paris", "seine", "rome", "go", "go"]
    assert len(encoded) == 4
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
    encoded = [ids.tolist() for ids in batch.passages.input_ids.split(batch.passages.lengths)]
    assert encoded == [model.template.sequence(corpus[name]) for name in ("paris", "rome", "long")]
    assert batch.positive.tolist() == [0, 1, 0, 2, 2]
    assert batch.key_ids is batch.positive_ids is None


def test_golds_that_another_example_asks_for_are_positives(model, corpus):
    twin = corpus["seine"].model_copy(update={"id": "twin"})
    examples = [
        ask("both asked", "paris", "rome", gold=["paris", "rome"]),
        ask("one asked", "rome", gold=["seine", "rome", "nowhere", "nile"]),
        ask("by its text", "go", "rome", gold=["twin", "paris"]),
        ask("other", "seine"),
        ask("asked by its text", "seine", "go", gold=["twin", "go"]),
    ]
    batch = make_batch(examples, {**corpus, "twin": twin}, model.template)
    paris, rome, go, seine = range(4)
    assert batch.positive.tolist() == [paris, rome, rome, go, rome, seine, seine, go]
    assert batch.key_ids.tolist() == [0, 1, 2, 3]
    assert batch.positive_ids.tolist() == [
        [-1, -1], [-1, -1], [seine, -1], [paris, seine], [paris, seine], [-1, -1], [-1, -1], [-1, -1],
    ]  # fmt: skip
    assert make_batch(examples[:1], corpus, model.template).positive_ids is None


def test_hard_negatives_are_encoded_behind_what_is_asked_for(model, corpus):
    twin = corpus["rome"].model_copy(update={"id": "twin"})
    known = {**corpus, "twin": twin}
    first = ask("first", "paris").model_copy(update={"negatives": ["seine", "nile", "twin"]})
    second = ask("second", "rome", gold=["rome", "seine"]).model_copy(update={"negatives": ["nile", "paris"]})
    batch = make_batch([first, second], known, model.template)
    encoded = [ids.tolist() for ids in batch.passages.input_ids.split(batch.passages.lengths)]
    # rome under another id, nile and paris again are there already.
    expected = [model.template.sequence(corpus[name]) for name in ("paris", "rome", "seine", "nile")]
    assert encoded == expected
    assert batch.positive.tolist() == [0, 1]
    # What is a negative of the first is gold for the second, and stays a positive of it.
    seine = int(batch.key_ids[2])
    assert batch.positive_ids.tolist() == [[-1], [seine]]
    nothing_asked = Example(id="x", question="?", output=[Segment(text="a")], negatives=["nile"])
    assert make_batch([nothing_asked], corpus, model.template).passages is None


def test_batch_without_retrieval_has_no_passages(model, corpus):
    batch = make_batch([Example(id="x", question="?", output=[Segment(text="a")])], corpus, model.template)
    assert batch.passages is None
    assert batch.query_rows.dtype == batch.positive.dtype == torch.int64
    assert len(batch.query_rows) == len(batch.positive) == 0
    moved = batch.to(torch.device("cpu"))
    assert moved.passages is None


def test_to_moves_every_tensor(model, examples, corpus):
    further = [ask("x", "paris", gold=["seine"])]
    moved = make_batch([*examples, *further], corpus, model.template).to(torch.device("meta"))
    assert moved.positive_ids is not None
    for tensor in (*vars(moved).values(), *vars(moved.gen).values(), *vars(moved.passages).values()):
        assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta"


def test_empty_batch_is_refused(model, corpus):
    with pytest.raises(ValueError, match="at least one example"):
        make_batch([], corpus, model.template)
