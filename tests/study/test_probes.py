"""Passages that are swapped or altered, attention by layer, and how two spaces lie to each other."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.data.packing import make_batch
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.evaluation import Corpus, TestSet, Workbench
from cosup_fast.generation import GenerationConfig
from cosup_fast.study.attention import Layout, attention_by_layer
from cosup_fast.study.handed import followed, replaced, swapped, with_answer
from cosup_fast.study.spaces import cka, look

LEADS = [
    Passage(id="nile", title="Nile", text="The Nile is a river of 6650 km in Africa."),
    Passage(id="rhine", title="Rhine", text="The Rhine is a river of 1230 km in Europe."),
    Passage(id="amazon", title="Amazon", text="The Amazon is a river of 6400 km in America."),
]


def _asked(name, question, answer, passage):
    return Example(
        id=name, question=question, answers=[answer], gold=[passage], output=[Segment(text=answer, passage=passage)]
    )


ASKED = [
    _asked("n", "How long is the Nile?", "6650 km", "nile"),
    _asked("r", "How long is the Rhine?", "1230 km", "rhine"),
    _asked("a", "Where is the Amazon?", "America", "amazon"),
    _asked("e", "Where is the Rhine?", "Europe", "rhine"),
    _asked("x", "Where is the Nile?", "Asia", "nile"),  # which the passage does not say
]
TEST, LEADS_CORPUS = TestSet("rivers", ASKED), Corpus(LEADS, "leads")


def test_a_replaced_answer_is_one_of_the_same_shape(model):
    found = {one.original.id: one for one in replaced(TEST, LEADS_CORPUS, model.template)}
    assert {name: one.asked.answers for name, one in found.items()} == {
        "n": ["1230 km"], "r": ["6650 km"], "a": ["Europe"], "e": ["America"],
    }  # fmt: skip
    assert found["a"].passage.text == "The Amazon is a river of 6400 km in Europe."
    assert found["n"].asked.gold == [found["n"].passage.id]
    assert found["n"].original == ASKED[0]


def test_a_swapped_passage_holds_no_answer(model):
    found = {one.original.id: one.passage.title for one in swapped(TEST, LEADS_CORPUS, model.template)}
    assert found == {"n": "Rhine", "r": "Amazon", "a": "Rhine", "e": "Nile"}


@pytest.mark.parametrize(
    ("name", "teach", "follows_passage", "follows_memory"),
    [
        ("replaced", lambda one: one.asked.answers[0], 1, 0),
        ("replaced", lambda one: one.original.answers[0], 0, 1),
        ("swapped", lambda one: f"the {one.passage.title}.", 1, 0),
    ],
)
def test_what_is_written_is_counted_as_passage_or_memory(make_model, name, teach, follows_passage, follows_memory):
    model = make_model()
    rows = list({"replaced": replaced, "swapped": swapped}[name](TEST, LEADS_CORPUS, model.template))
    lessons = [
        one.asked.model_copy(update={"output": [Segment(text=teach(one), passage=one.passage.id)]}) for one in rows
    ]
    batch = make_batch(lessons, {one.passage.id: one.passage for one in rows}, model.template)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(70):
        optimizer.zero_grad()
        model(batch).ntp.backward()
        optimizer.step()
    found = followed(
        name, Workbench(model.eval(), progress=False), [TEST], {"": LEADS_CORPUS},
        GenerationConfig(ret_first=True, max_retrievals=1, max_new_tokens=24), progress=lambda *_: None,
    )  # fmt: skip
    assert found == {
        "rivers": {
            "follows_passage": dict.fromkeys("nrae", follows_passage),
            "follows_memory": dict.fromkeys("nrae", follows_memory),
        }
    }


def test_punctuation_after_an_answer_stays_with_the_sentence():
    example = _asked("x", "?", "New York", "p")
    assert with_answer("In New York, or (new york). York", example, "Rome") == "In Rome, or (Rome). York"


def test_the_tokens_of_a_layout_spell_what_they_should(model):
    layout = Layout(model, ASKED[0], LEADS[0])
    decode = model.template.tokenizer.decode
    assert decode([layout.ids[i] for i in layout.passage]) == "Nile :: The Nile is a river of 6650 km in Africa."
    assert decode([layout.ids[i] for i in layout.answer]).strip() == "6650 km"
    assert decode([layout.ids[i + 1] for i in layout.rows]) == "6650 km"
    assert decode([layout.ids[i] for i in layout.prompt]).endswith("How long is the Nile?## Output:\n\n")


def test_attention_is_that_of_transformers_own_eager_model(model):
    found = attention_by_layer(model, [TEST], {"": LEADS_CORPUS}, limit=2)
    assert found["questions"] == 2
    totals, even = torch.zeros(2), 0.0
    hidden: dict[int, torch.Tensor] = {}
    layers = model.gen.base_model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: hidden.__setitem__(i, kwargs["hidden_states"]), with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    for example, passage in zip(ASKED[:2], LEADS[:2], strict=True):
        layout = Layout(model, example, passage)
        ids = torch.tensor([layout.ids])
        with torch.no_grad():
            model.gen.base_model(input_ids=ids, use_cache=False)
            rotary = model.gen.base_model.rotary_emb(hidden[0], torch.arange(ids.shape[1])[None])
            for i, layer in enumerate(layers):
                weights = _weights(layer.self_attn, hidden[i], rotary)[:, layout.rows]
                totals[i] += weights[..., layout.passage].sum(-1).mean()
        even += sum(len(layout.passage) / (row + 1) for row in layout.rows) / len(layout.rows)
    for hook in hooks:
        hook.remove()
    assert found["by_layer"]["passage"] == pytest.approx((totals / 2).tolist(), abs=2e-5)
    assert found["even"] == pytest.approx(even / 2, abs=2e-5)
    with pytest.raises(ValueError, match="no test set has a question whose answer is in its gold passage"):
        attention_by_layer(model, [TestSet("x", ASKED[4:])], {"": LEADS_CORPUS})


def _weights(attention, hidden, rotary):
    """softmax(q k / sqrt(d)) of one layer, (heads, T, T), from its definition."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads = attention.head_dim
    q, k = (p(hidden)[0].unflatten(-1, (-1, heads)).transpose(0, 1)[None] for p in (attention.q_proj, attention.k_proj))
    q, k = (x[0] for x in apply_rotary_pos_emb(q, k, *rotary))
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    scores = q @ k.transpose(1, 2) / heads**0.5
    return scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)


def test_cka_sees_through_turns_and_scales_and_finds_nothing_where_there_is_nothing():
    torch.manual_seed(0)
    x = torch.randn(60, 200)
    turn = torch.linalg.qr(torch.randn(200, 200))[0]
    assert cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-6)
    assert abs(cka(x, torch.randn(60, 300))) < 0.1
    half = cka(x, torch.cat([x[:, :100], torch.randn(60, 100)], dim=1))
    assert 0.2 < half < 0.8
    assert cka(x[:3], x[:3]) is None


def test_a_look_at_the_spaces_leaves_the_model_as_it_is(make_model, examples, corpus, passages):
    model = make_model()
    model.train()
    before = model.fingerprint()
    found = look(model, examples, corpus, passages)
    assert model.training
    assert model.fingerprint() == before
    assert 0 <= found["alignment"] <= 4
    assert found["passage_uniformity"] < 0
    assert look(make_model(shared=True), examples, corpus, passages) == found  # two copies of the same weights
