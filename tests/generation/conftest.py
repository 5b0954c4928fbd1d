"""Random models that choose [NSP], [Ce] and </s> now and then, and the plain decoder they are compared with."""

import pytest
import torch

from cosup_fast.cli.bench import load_benchmarks
from cosup_fast.data.packing import Pack
from cosup_fast.generation import Decoder

load_benchmarks()


@torch.no_grad()
def _retrieve_from(model, passages):
    embeddings = torch.cat([model.embed(Pack.of([model.template.sequence(p)])) for p in passages])

    def retrieve(query, k):
        scores = embeddings @ query.to(embeddings.dtype)
        return [(passages[row], float(scores[row])) for row in scores.argsort(descending=True)[:k].tolist()]

    return retrieve


def _fed_tokens(model, run):
    fed: list[int] = []
    Decoder(model, lambda query, k: [])  # the first one of a model reads a few tokens to check it

    def record(module, args, kwargs):
        fed.extend(kwargs["input_ids"][0].tolist())

    hook = model.gen.base_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        return run(), fed
    finally:
        hook.remove()


@pytest.fixture(scope="session")
def retrieve_from():
    """Exact search by Embseq's hidden states, one passage at a time."""
    return _retrieve_from


@pytest.fixture(scope="session")
def fed_tokens():
    """What `run()` returns, and the tokens that Gen's backbone read, in order."""
    return _fed_tokens
