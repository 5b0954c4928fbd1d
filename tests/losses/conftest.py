"""What tests of losses share."""

import pytest
from torch import nn


class _Lookup(nn.Module):
    def forward(self, features):
        return {"sentence_embedding": features["x"]}


@pytest.fixture
def lookup():
    """A sentence encoder whose sentences are embeddings already."""
    return _Lookup()
