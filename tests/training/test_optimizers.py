"""AdamW over local shards: 8-bit states, bf16 weights that move, steps in the backward pass, what is refused."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from cosup_fast.config.training import OptimizerName
from cosup_fast.training import adamw
from cosup_fast.training.adamw import OPTIMIZERS, check_available
from cosup_fast.training.optimizers import LocalOptimizer


def regression(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, dtype=dtype), nn.Tanh(), nn.Linear(128, 64, dtype=dtype))
    x = torch.randn(128, 64)
    return model, x.to(dtype), torch.tanh(x @ torch.randn(64, 64) / 8).to(dtype)


def losses(name, steps, *, dtype=torch.float32, lr=1e-3, **options):
    model, x, y = regression(dtype)
    optimizer = LocalOptimizer(model.named_parameters(), name, lr=lr, **options)
    seen = []
    for _ in range(steps):
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(loss))
    return seen, model, optimizer


def test_adamw_is_torchs(tmp_path):
    model, x, y = regression()
    ours, trained, _ = losses("adamw", 5, weight_decay=0.1)
    groups = [{"params": [p for p in model.parameters() if p.ndim == n]} for n in (2, 1)]
    groups[1]["weight_decay"] = 0.0
    plain = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, foreach=False)
    for _ in range(5):
        (model(x) - y).square().mean().backward()
        plain.step()
        plain.zero_grad()
    for p, expected in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)


def test_8_bit_states_follow_those_of_32():
    full, _, _ = losses("adamw", 200)
    quantized, model, optimizer = losses("adamw-8bit", 200)
    assert quantized[-1] < 0.1 * quantized[0]
    assert quantized == pytest.approx(full, abs=0.01 * full[0])
    states = optimizer.states()
    assert states["0.weight"]["state1"].dtype == torch.uint8
    assert states["0.bias"]["state1"].dtype == torch.float32  # too small to be worth it
    optimizer.inner[0].state[model[0].weight]["state1"] = torch.zeros(64 * 128)
    with pytest.raises(AssertionError, match="not 8-bit"):
        optimizer.states()


def test_a_step_in_the_backward_pass_is_the_same_step_and_keeps_no_gradient():
    apart, expected, _ = losses("adamw", 4)
    inside, model, optimizer = losses("adamw", 4, in_backward=True)
    assert inside == apart
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
    (model(torch.zeros(1, 64)).sum()).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.set_lr(0.0)
    before = [p.clone() for p in model.parameters()]
    (model(torch.ones(1, 64)).sum()).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw-8bit-torchao"])
def test_bf16_weights_move_by_what_they_are_told(name):
    """At a learning rate that rounding to nearest loses: the mean step is that of fp32."""

    def moved(dtype, chosen):
        model = nn.Linear(256, 256, bias=False, dtype=dtype)
        torch.manual_seed(0)
        nn.init.normal_(model.weight, std=0.02)
        before = model.weight.detach().float().clone()
        optimizer = LocalOptimizer(model.named_parameters(), chosen, lr=2e-5)
        for _ in range(10):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        return (model.weight.detach().float() - before).mean().item()

    assert moved(torch.bfloat16, name) == pytest.approx(moved(torch.float32, "adamw"), rel=0.1)


@pytest.mark.slow
def test_torchaos_8_bit_states_follow_those_of_32():
    full, _, _ = losses("adamw", 100)
    quantized, _, optimizer = losses("adamw-8bit-torchao", 100)
    assert quantized == pytest.approx(full, abs=0.01 * full[0])
    assert optimizer.states()["0.weight"]["exp_avg"].codes.dtype == torch.uint8


def test_what_torchao_would_not_quantize_is_refused():
    with pytest.raises(ValueError, match=r"4160 elements.*not a multiple of 256; use adamw-8bit"):
        LocalOptimizer(nn.Linear(65, 64).named_parameters(), "adamw-8bit-torchao", lr=1e-3)


def test_every_optimizer_of_the_configuration_has_a_class():
    assert list(OPTIMIZERS) == list(get_args(OptimizerName))


@pytest.mark.parametrize(
    ("name", "rounded", "package"),
    [("adamw", True, "torchao"), ("adamw-8bit", False, "bitsandbytes"), ("adamw-8bit-torchao", False, "torchao")],
)
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, name, rounded, package):
    monkeypatch.setattr(adamw.importlib.util, "find_spec", lambda name: None)
    check_available("adamw", rounded=False)
    with pytest.raises(ValueError, match=rf"training.optimizer={name}.*{package}.*pip install"):
        check_available(name, rounded=rounded)
