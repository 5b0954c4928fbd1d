"""Answers made by hand, an index, and systems over the tiny model."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.data.packing import make_batch
from cosup_fast.data.template import gap
from cosup_fast.evaluation import IndexRetriever, System
from cosup_fast.generation import Answer, AnswerSegment, Candidate, Retrieval
from cosup_fast.index import SequenceIndex


@pytest.fixture(scope="session")
def answer_of():
    """A function that makes an answer of (text, passage or None) and the ids retrieved, each before `go`."""

    def make(*segments: tuple[str, str | None], retrieved: tuple[str, ...] = ()) -> Answer:
        text = ""
        for piece, _ in segments:
            text += gap(text, piece) + piece
        return Answer(
            text=text,
            segments=tuple(AnswerSegment(text=text, passage=passage) for text, passage in segments),
            retrievals=tuple(
                Retrieval(
                    candidates=(Candidate(passage=p, title="", score=1.0), Candidate(passage="go", title="", score=0))
                )
                for p in retrieved
            ),
            stop_reason="end",
            prompt_tokens=1,
            generated_tokens=1,
            inserted_tokens=1,
        )

    return make


@pytest.fixture(scope="session")
def index(model, passages) -> SequenceIndex:
    return SequenceIndex.build(model, passages, progress=False)


@pytest.fixture
def system(model, index) -> System:
    return System("co-supervised", model, IndexRetriever(model, index))


@pytest.fixture(scope="session")
def trained(make_model, examples, corpus):
    """Taught the four examples by heart."""
    model = make_model(nsp={"weight": 1.0, "temperature": 0.1})
    model.train()
    batch = make_batch(examples, corpus, model.template)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(150):
        optimizer.zero_grad()
        model(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
