"""Indexes of the shared passages, in memory and in a folder, and what makes two of them the same."""

import shutil

import pytest
import torch

from cosup_fast.data.records import Passage
from cosup_fast.index import Options, SequenceIndex


@pytest.fixture(scope="session")
def more():
    """Passages that no index holds yet."""
    return [
        Passage(id="oslo", title="Oslo", text="Oslo is the capital of Norway."),
        Passage(id="x", title="X", text="y"),
    ]


@pytest.fixture(scope="module")
def index(model, passages) -> SequenceIndex:
    return SequenceIndex.build(model, passages, progress=False)


@pytest.fixture(scope="module")
def built(model, passages, tmp_path_factory):
    """An index of three shards in a folder; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("built") / "index"
    SequenceIndex.build(model, passages, folder, options=Options(shard_size=4, progress=False))
    return folder


@pytest.fixture
def saved(built, tmp_path):
    """A copy of it that tests may change."""
    return shutil.copytree(built, tmp_path / "index")


@pytest.fixture(scope="session")
def same_index():
    """A function that asserts that two indexes hold the same and answer alike."""

    def same_index(a: SequenceIndex, b: SequenceIndex) -> None:
        assert list(a.passages) == list(b.passages)
        torch.testing.assert_close(a.embeddings, b.embeddings, rtol=0, atol=2e-6)
        queries = torch.randn(4, a.dim, generator=torch.Generator().manual_seed(1))
        ours, theirs = a.search(queries, 5), b.search(queries, 5)
        assert torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(ours[0], theirs[0])

    return same_index
