"""Devices by name: what can run models, and what is refused."""

from __future__ import annotations

import pytest
import torch

from cosup_fast.environment import choose_device


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_devices_that_cannot_run_models_are_refused(name):
    with pytest.raises(ValueError, match=rf"--device='{name}': models run on cpu and cuda devices"):
        choose_device(name, "--device")


def test_the_device_of_a_cpu():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"training\.device='gpu'"):
        choose_device("gpu")
