"""Hard negatives: chosen as a plain loop over all passages chooses them, and what interrupts mining costs nothing."""

from __future__ import annotations

import json

import pytest
import torch

from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.index import SequenceIndex, embed_queries, mining
from cosup_fast.index.mining import MiningConfig, bears_answer, mine

MORE = [
    Passage(id="lutetia", title="Lutetia", text="The town that became paris, on the SEINE, measured 777 Km."),
    Passage(id="twin", title="Paris", text="Paris is the capital of France. It lies on the Seine."),
    Passage(id="oslo", title="Oslo", text="Oslo is the capital of Norway."),
]


@pytest.fixture(scope="module")
def index(model, passages) -> SequenceIndex:
    return SequenceIndex.build(model, [*passages, *MORE], progress=False)


def by_hand(model, index, examples, config) -> list[list[str]]:
    """The definition, passage by passage."""
    corpus = {p.id: p for p in index.passages}
    embedding = dict(zip(corpus, index.embeddings))
    queries, asked = embed_queries(model, examples, corpus)
    lists: list[list[list[str]]] = [[] for _ in examples]
    for query, (number, positive) in zip(queries, asked):
        example = examples[number]
        gold = {(corpus[name].title, corpus[name].text) for name in example.gold}
        given = {(corpus[name].title, corpus[name].text) for name in example.negatives}
        score = {name: float(query @ e) for name, e in embedding.items()}
        ranked = sorted(corpus, key=lambda name: -score[name])[config.skip_top : config.depth]
        top = score[positive]
        lists[number].append([])
        for name in ranked:
            passage = corpus[name]
            if (passage.title, passage.text) in gold | given or bears_answer(passage, example):
                continue
            if config.margin is not None and score[name] > top - config.margin:
                continue
            if config.max_score is not None and score[name] > top - (1 - config.max_score) * abs(top):
                continue
            lists[number][-1].append(name)
    chosen = []
    for per_query in lists:
        turns = [names[i] for i in range(len(corpus)) for names in per_query if i < len(names)]
        contents = {}
        for name in turns:
            contents.setdefault((corpus[name].title, corpus[name].text), name)
        chosen.append(list(contents.values())[: config.per_example])
    return chosen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_example": 1},
        {"per_example": 50},
        {"depth": 3, "per_example": 3},
        {"skip_top": 4, "per_example": 20},
        {"margin": 0.0, "per_example": 20},
        {"margin": 0.2, "per_example": 20},
        {"max_score": 0.5, "per_example": 20},
        {"max_score": 0.9, "margin": 0.1, "per_example": 20},
    ],
    ids=str,
)
def test_the_choice_is_that_of_a_plain_loop(model, index, examples, options):
    given = examples[0].model_copy(update={"negatives": ["rome"]})
    nothing = Example(id="none", question="?", output=[Segment(text="no passage")])
    asked = [given, *examples[1:], nothing]
    config = MiningConfig(**options)
    mined = mine(model, index, asked, config, progress=False)
    expected = by_hand(model, index, asked, config)
    text = {passage.id: passage.text for passage in index.passages}  # two passages of one text are a tie
    found = [[text[name] for name in e.negatives] for e in mined.examples]
    assert found == [[text[name] for name in names] for names in (["rome", *expected[0]], *expected[1:])]
    assert mined.found == sum(map(len, expected))
    assert mined.short == sum(len(names) < config.per_example for names in expected)
    for before, after in zip(asked, mined.examples):
        assert after.model_copy(update={"negatives": before.negatives}) == before


def test_a_score_at_the_ceiling_is_not_above_it(model, index, examples, monkeypatch):
    query = torch.eye(index.embeddings.shape[1])[:1]  # its scores are the first numbers of the embeddings, exactly
    first = {passage.id: float(e[0]) for passage, e in zip(index.passages, index.embeddings)}
    monkeypatch.setattr(mining, "embed_queries", lambda *given: (query, [(0, "paris")]))
    monkeypatch.setattr(MiningConfig, "ceiling", lambda self, positive: torch.full_like(positive, first["oslo"]))
    (mined,) = mine(model, index, examples[:1], MiningConfig(margin=0, per_example=50), progress=False).examples
    assert mined.negatives[0] == "oslo"
    assert all(first[name] <= first["oslo"] for name in mined.negatives)


def test_a_place_that_the_search_leaves_empty_is_no_passage(model, index, examples, monkeypatch):
    """Backends may find fewer than they are asked for."""
    search = index.search
    chosen = mine(model, index, examples, MiningConfig(depth=3, per_example=3)).examples

    def fewer(queries, k):
        scores, rows = search(queries, k)
        scores[:, 3:], rows[:, 3:] = -torch.inf, -1
        return scores, rows

    monkeypatch.setattr(type(index), "search", lambda index, queries, k: fewer(queries, k))
    assert mine(model, index, examples, MiningConfig(depth=len(index), per_example=3)).examples == chosen


def test_what_answers_is_no_negative(model, index, examples):
    mined = mine(model, index, examples, MiningConfig(per_example=50), progress=False)
    first, second, third, fourth = (set(example.negatives) for example in mined.examples)
    assert not first & {"paris", "twin", "seine", "lutetia"} - {"seine"}  # answer: Paris
    assert "seine" in first
    assert not second & {"paris", "twin", "seine", "lutetia"}  # answer: 777 km, by words, whatever the case
    assert "rome" not in third  # gold, and its text matches the pattern
    assert "go" not in fourth
    assert "oslo" in first & second & third & fourth
    assert mined.passed_over["gold"] > 0
    assert mined.passed_over["answer"] > 0


@pytest.mark.parametrize(
    ("answers", "kind", "text", "expected"),
    [
        (["Élysée Palace"], "string", "in the elysee palace, Paris", True),
        (["Tokyo"], "string", "of the title alone", True),
        (["art"], "string", "a party of artists", False),
        ([r"^\d+ BC"], "regex", "first line\n753 bc", True),
        ([r"(a|a)+$"], "regex", "a" * 60 + "b", True),  # backtracks without end: it may answer
        ([], "string", "anything", False),
    ],
)
@pytest.mark.filterwarnings("ignore:the answer pattern")
def test_bearing_an_answer(monkeypatch, answers, kind, text, expected):
    monkeypatch.setattr("cosup_fast.data.answers.PATTERN_SECONDS", 0.05)
    example = Example(id="e", question="q", output=[], answers=answers, answer_type=kind)
    assert bears_answer(Passage(id="p", title="Tokyo", text=text), example) is expected


def test_a_negative_holds_none_of_the_short_answers(model, passages):
    sets = Example(id="e", question="q", output=[], answer_sets=[["777 km", "1,000 km"], ["Seine"]], gold=["go"])
    assert bears_answer(Passage(id="p", title="Seine", text="A river."), sets)
    assert bears_answer(Passage(id="p", title="Rhône", text="It is 1000 km long."), sets)
    assert not bears_answer(Passage(id="p", title="Rhône", text="It is 813 km long."), sets)
    index = SequenceIndex.build(model, passages, progress=False)
    mined = mine(model, index, [sets], MiningConfig(per_example=20), progress=False)
    assert mined.examples[0].negatives
    assert not {"seine", "paris"} & set(mined.examples[0].negatives)


def test_mining_goes_on_where_it_was_interrupted(model, index, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "BLOCK", 1)
    whole = mine(model, index, examples, progress=False)
    journal, seen = tmp_path / "journal", []

    def embed(model, block, corpus, stop=99):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(block[0].id)
        return embed_queries(model, block, corpus)

    monkeypatch.setattr(mining, "embed_queries", lambda *given: embed(*given, stop=3))
    with pytest.raises(KeyboardInterrupt):
        mine(model, index, examples, journal=journal, progress=False)
    # A kill in the middle of a line leaves half of it.
    text = journal.read_text()
    journal.write_text(text[: text.rindex('{"key": "e3"') + 15])
    monkeypatch.setattr(mining, "embed_queries", embed)
    assert mine(model, index, examples, journal=journal, progress=False) == whole
    assert seen == ["e1", "e2", "e3", "e3", "e4"]
    assert mine(model, index, examples, journal=journal, progress=False) == whole
    assert len(seen) == 5
    assert [json.loads(line).get("key") for line in journal.read_text().splitlines()] == [None, "e1", "e2", "e3", "e4"]
    mine(model, index, examples, MiningConfig(depth=5), journal=journal, progress=False)
    assert len(seen) == 9


def test_what_mining_refuses(model, index, examples):
    with pytest.raises(ValueError, match="'e1' occurs more than once"):
        mine(model, index, [examples[0], examples[0]], progress=False)
    stranger = Example(id="s", question="q", output=[], gold=["atlantis"])
    with pytest.raises(ValueError, match="'s' names the passage 'atlantis', which the index lacks"):
        mine(model, index, [stranger], progress=False)
    with pytest.raises(ValueError, match="skip_top=7 leaves nothing of the depth=7"):
        MiningConfig(depth=7, skip_top=7)
    for wrong in ({"margin": -1}, {"margin": float("nan")}, {"max_score": 1.5}, {"per_example": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MiningConfig(**wrong)


def test_a_negative_positive_score_still_bounds_from_below():
    config = MiningConfig(max_score=0.9)
    torch.testing.assert_close(config.ceiling(torch.tensor([2.0, -2.0])), torch.tensor([1.8, -2.2]))
    assert MiningConfig().ceiling(torch.tensor([1.0])).tolist() == [float("inf")]
