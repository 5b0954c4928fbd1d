"""Layers recomputed or compiled have the gradients of plain ones; what is kept, and that nothing compiles twice."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cosup_fast.config.training import TrainingConfig
from cosup_fast.data.packing import PackLimits, make_batch
from cosup_fast.training.step import accumulate_gradients
from cosup_fast.training.trainer import Trainer

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


class _Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _gradients(model, batch, **options):
    model.zero_grad(set_to_none=True)
    accumulate_gradients(model, batch, **options)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def dropout(gpt2_folder):
    return {"gen": gpt2_folder, "embseq": gpt2_folder}


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("cut", [PackLimits(), PackLimits(sequences=1)], ids=["one pack", "packs"])
def test_recomputed_gradients_are_those_of_what_was_kept(kind, cut, make_model, dropout, examples, corpus):
    results = []
    for recompute in ("none", kind):
        model = make_model(dtype="float64", **dropout).train()
        model.enable_activation_checkpointing(recompute)
        torch.manual_seed(1)
        results.append(_gradients(model, make_batch(examples, corpus, model.template, cut)))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert (results[1][name] - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-12, name


def test_selective_repeats_no_product_and_full_repeats_them_all(make_model, examples, corpus):
    counts = {}
    for kind in ("none", "selective", "full"):
        model = make_model().train()
        model.enable_activation_checkpointing(kind)
        with _Operators() as seen:
            _gradients(model, make_batch(examples, corpus, model.template))
        counts[kind] = seen.count
    for name in PRODUCTS:
        assert counts["selective"].get(name) == counts["none"].get(name), name
    assert counts["full"]["aten::mm"] > counts["none"]["aten::mm"]
    assert counts["selective"]["aten::rsqrt"] > counts["none"]["aten::rsqrt"]


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True], ids=["any shape", "fixed shapes"])
def test_compiled_layers_are_eager_ones_and_compile_once(fixed, make_model, examples, corpus, tmp_path):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = make_model().train(), make_model().train()
    compiled.compile_layers(fixed_shapes=fixed)
    cuts = [PackLimits(300, 2, fixed=True)] if fixed else [PackLimits(), PackLimits(sequences=1), PackLimits(300, 2)]
    graphs = []
    for chosen in (examples, examples[::-1], examples[1:] * 2):
        for cut in cuts:
            batch = make_batch(chosen, corpus, plain.template, cut)
            expected, found = _gradients(plain, batch), _gradients(compiled, batch)
            assert found.keys() == expected.keys()
            for name, b in expected.items():
                assert (found[name] - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6, name
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]  # other packs, the same code


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bits(make_model, examples, corpus, tmp_path):
    from cosup_fast.model import CoSupervisionModel

    fields = {"batch_size": 2, "lr": 1e-2, "eval_every": None, "steps": 5, "compile": True}
    fields |= {"tokens_per_micro_batch": 300, "fixed_shapes": True}

    def trainer(model, output, seen):
        torch._dynamo.reset()
        return Trainer(model, TrainingConfig(**fields), examples, corpus, tmp_path / output, on_metrics=seen.append)

    whole, rest = [], []
    trainer(make_model(), "whole", whole).train()
    first = trainer(make_model(), "parts", [])
    first.model.train()
    torch.manual_seed(0)
    for _ in range(3):
        first.take_step()
    saved = first.save()
    resumed = trainer(CoSupervisionModel.load(saved), "parts", rest)
    resumed.resume(saved)
    resumed.train()
    assert [(m.loss, m.gen_grad_norm) for m in rest] == [(m.loss, m.gen_grad_norm) for m in whole[3:]]
