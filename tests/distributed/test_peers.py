"""Ranks that die, stop, or never come: an error that names them, within the timeout."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.distributed import Peers
from cosup_fast.functional import info_nce


@pytest.mark.parametrize("how", ["dies", "stops"])
@pytest.mark.parametrize("when", ["before", "within"])
def test_a_lost_rank_is_named_in_time(make_world, how, when):
    timeout = 30 if (how, when) == ("dies", "within") else 2
    world = make_world(5)
    world.send("lost", how, when, 2, timeout)
    for rank in (0, 1, 3, 4):
        text, seconds = world.answer(rank, timeout=60)
        assert ("rank 2 did not come within 2 s" if when == "before" else "rank 2 stopped answering") in text
        assert seconds < 15  # a rank that dies in a collective is noticed at once


@pytest.mark.parametrize("when", ["first", "before"])
def test_the_loss_of_the_rank_that_holds_the_store_is_told(make_world, when):
    world = make_world(2)
    world.send("lost", "dies", when, 0, 1.5)
    text, seconds = world.answer(1, timeout=30)
    assert "rank 0 holds it" in text
    assert seconds < 15


def test_what_peers_refuse():
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        info_nce(torch.randn(2, 3), torch.randn(2, 3), group=object())  # pyright: ignore
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        Peers()
