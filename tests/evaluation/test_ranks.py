"""Teacher-forced retrieval: how many passages stand ahead of the one that is asked for."""

import pytest
import torch

from cosup_fast.data.records import Example, Segment
from cosup_fast.evaluation.ranks import asked, retrieval_ranks
from cosup_fast.index import embed_passages, embed_queries


def test_ranks_count_the_passages_ahead(model, index, passages, examples, corpus):
    queries, origins = embed_queries(model, examples, corpus)
    embeddings = embed_passages(model, passages)
    expected = []
    for query, (_, passage) in zip(queries, origins, strict=True):
        order = sorted(range(len(passages)), key=lambda row: -float(embeddings[row] @ query))
        expected.append([passages[row].id for row in order].index(passage))
    assert retrieval_ranks(model, examples, index) == expected
    assert retrieval_ranks(model, examples, passages, batch_tokens=50) == expected
    assert len(set(expected)) > 2


def test_what_each_query_asks_for(examples):
    first, second = asked(examples[1].model_copy(update={"gold": ["paris", "seine", "rome"]}))
    assert [s.text for s in first[0]] == ["First the city. "]
    assert [s.text for s in second[0]] == ["First the city. ", "Paris lies on the Seine. ", "Then its length: "]
    assert (first[1], second[1]) == ({"paris", "rome"}, {"seine", "rome"})
    assert asked(Example(id="a", question="?", output=[], gold=["x", "y"])) == [((), {"x", "y"})]
    assert asked(Example(id="s", question="?", output=[Segment(text="no passage")])) == []


def test_the_best_gold_passage_counts_unless_another_query_asks_for_it(model, index, corpus):
    question = "Which river crosses it?"
    alone = {
        p: retrieval_ranks(model, [Example(id="x", question=question, output=[Segment(text="a", passage=p)])], index)[0]
        for p in corpus
    }
    first, last = min(alone, key=alone.__getitem__), max(alone, key=alone.__getitem__)
    either = Example(id="x", question=question, output=[Segment(text="a", passage=last)], gold=[last, first, "absent"])
    assert retrieval_ranks(model, [either], index) == [0]
    both = Example(
        id="x", question=question, output=[Segment(text="a", passage=last), Segment(text="b", passage=first)]
    )
    assert retrieval_ranks(model, [both], index)[0] == alone[last] == len(corpus) - 1


def test_examples_without_queries_have_no_ranks(model, index, examples):
    silent = Example(id="s", question="?", output=[Segment(text="no passage")])
    asking = Example(id="a", question="Capital?", output=[], gold=["rome"])
    assert len(retrieval_ranks(model, [silent, asking, examples[0]], index)) == 2
    assert retrieval_ranks(model, [silent], index) == []


def test_ties_count_against_the_gold_passage(make_model, passages, examples):
    model = make_model()
    with torch.no_grad():
        model.embseq.norm.weight.zero_()  # every passage at the origin
    ranks = retrieval_ranks(model, examples, passages)
    assert ranks == [len(passages) - 1] * 6


def test_gold_passages_must_be_in_the_corpus(model, passages, examples):
    with pytest.raises(ValueError, match=r"'e1'.*unknown passage id 'paris'"):
        retrieval_ranks(model, examples, passages[1:])
    asking = Example(id="a", question="?", output=[], gold=["atlantis", "mu"])
    with pytest.raises(ValueError, match=r"'a': none of its gold passages \['atlantis', 'mu'\] is in the corpus"):
        retrieval_ranks(model, [asking], passages)
