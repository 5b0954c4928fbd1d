"""A checkpoint that indexes are built with."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def checkpoint(model, tmp_path_factory):
    """Tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save(folder)
    return folder
