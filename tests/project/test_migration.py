"""The migration page: both snippets of a section run on the same inputs, and have the same loss and gradients.

A library that is installed runs itself; otherwise what its loss is defined as runs in its place.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.providers import open_clip

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
SECTIONS = {
    heading: re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for heading, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
}
PAIRS = [(name, i) for name, blocks in SECTIONS.items() for i in range(len(blocks) - 1)]


class Sentences(nn.Embedding):
    """An encoder with the interface of SentenceTransformer's modules: the mean of its tokens' embeddings."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": super().forward(features["input_ids"]).mean(1)}


def contrast(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of queries with as many candidates each, in one matrix; the first of its own is the positive."""
    return F.cross_entropy(x @ y.T, torch.arange(len(x)) * (len(y) // len(x)))


class GradCache:
    """Gao et al. 2021, arXiv 2101.06983: the gradients of the batch in one piece."""

    def __init__(self, models: list[nn.Module], chunk_sizes: int, loss_fn: Any) -> None:
        self.models, self.loss = models, loss_fn

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        loss = self.loss(*(model(x) for model, x in zip(self.models, inputs, strict=True)))
        loss.backward()
        return loss.detach()


def clip_loss() -> Any:
    def loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (contrast(scale * image, text) + contrast(scale * text, image)) / 2

    return loss


def tokens_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ head.T, labels)


def onegen_loss(hidden: torch.Tensor, config: Any, index: Any, counts: list[int]) -> torch.Tensor:
    states = F.normalize(hidden[index], dim=-1)
    anchors, candidates = states[: counts[0]], states[counts[0] :]
    return F.cross_entropy(anchors @ candidates.T / config.info_nce_temperature, torch.arange(counts[0]))


class DenseModel(nn.Module):
    """Tevatron's, in training: scores over the temperature, one group of passages for each query."""

    temperature = 0.02

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 6)

    def forward(self, query: torch.Tensor | None = None, passage: torch.Tensor | None = None) -> SimpleNamespace:
        q, p = (None if x is None else self.encoder(x) for x in (query, passage))
        loss = None if q is None or p is None else contrast(q / self.temperature, p)
        return SimpleNamespace(q_reps=q, p_reps=p, loss=loss)


RESTATED: dict[str, dict[str, Any]] = {
    "grad_cache": {"GradCache": GradCache},
    "grad_cache.loss": {"SimpleContrastiveLoss": lambda: contrast},
    "open_clip": {"ClipLoss": clip_loss},
    "liger_kernel.transformers": {
        "LigerFusedLinearCrossEntropyLoss": lambda: lambda head, hidden, labels: tokens_loss(hidden, head, labels)
    },
    "cut_cross_entropy": {"linear_cross_entropy": tokens_loss},
    "onegen.util.loss": {"info_nce_loss": onegen_loss},
}


def put_in_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a module of a library that is missing, with its packages, from what is restated above."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        package = ".".join(parts[:i])
        if package not in sys.modules or package == name:
            module = ModuleType(package)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, package, module)
    for attribute, value in RESTATED[name].items():
        setattr(sys.modules[name], attribute, value)


def inputs() -> dict[str, Any]:
    """What the snippets take for granted."""
    torch.manual_seed(0)

    def column() -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(50, (9, 4)), "attention_mask": torch.ones(9, 4, dtype=torch.int64)}

    rows = torch.arange(7) % 3
    return {
        "torch": torch,
        "model": nn.Sequential(Sentences(50, 6)),
        "anchors": column(),
        "positives": column(),
        "negatives": column(),
        "encoder": nn.Linear(5, 6),
        "questions": torch.randn(9, 5),
        "passages": torch.randn(9, 5),
        "image_features": F.normalize(torch.randn(9, 6), dim=-1).requires_grad_(),
        "text_features": F.normalize(torch.randn(9, 6), dim=-1).requires_grad_(),
        "logit_scale": torch.tensor(14.3, requires_grad=True),
        "lm_head": nn.Linear(6, 40, bias=False),
        "hidden": torch.randn(11, 6, requires_grad=True),
        "labels": torch.randint(40, (11,)).index_fill_(0, torch.tensor([2, 5]), -100),
        "config": SimpleNamespace(info_nce_temperature=0.05, lambda_g=1.0, lambda_r=0.3),
        "rows": rows,
        "columns": torch.arange(7),
    }


def names_of(section: str) -> dict[str, Any]:
    names = inputs()
    if section == "Tevatron":
        names |= {"model": DenseModel(), "passages": torch.randn(18, 5)}
    if section == "OneGen":
        names |= {"hidden": torch.randn(3, 8, 6, requires_grad=True), "labels": torch.randint(40, (3, 8))}
        names |= {"anchors": range(2), "positives": range(2), "negatives": range(3)}
    return names


def outcome(block: str, names: dict[str, Any]) -> torch.Tensor:
    """The loss of a snippet; its gradients are there afterwards."""
    exec(compile(block, "docs/migration.md", "exec"), names)
    loss = names["loss"]
    leaves = [x for x in names.values() if isinstance(x, torch.Tensor) and x.is_leaf and x.requires_grad]
    given = [p for x in names.values() if isinstance(x, nn.Module) for p in x.parameters()]
    if loss.requires_grad and all(x.grad is None for x in [*leaves, *given]):
        loss.backward()
    return loss.detach()


def test_every_section_has_a_snippet_of_the_other_library_and_one_of_ours():
    with_snippets = {name: blocks for name, blocks in SECTIONS.items() if blocks}
    assert len(with_snippets) == 7
    for name, blocks in with_snippets.items():
        assert len(blocks) >= 2, name
        assert "cosup_fast" in blocks[-1], name
        assert not any("cosup_fast" in block for block in blocks[:-1]), name


@pytest.mark.parametrize(("section", "which"), PAIRS)
@pytest.mark.parametrize("how", ["restated", "installed"])
def test_both_snippets_have_the_same_loss_and_gradients(section, which, how, monkeypatch):
    theirs, ours = SECTIONS[section][which], SECTIONS[section][-1]
    imported = re.findall(r"^from (\S+) import", theirs, re.MULTILINE)
    context: Any = nullcontext()
    if how == "restated":
        if not set(imported) <= set(RESTATED):
            pytest.skip("always installed")
        for name in imported:
            put_in_place(name, monkeypatch)
    elif not imported or any(importlib.util.find_spec(name.partition(".")[0]) is None for name in imported):
        pytest.skip(f"{', '.join(imported) or section} is not installed")
    else:
        context = as_on_a_gpu(imported[0], monkeypatch)
    expected_names, names = names_of(section), names_of(section)
    with context:
        expected = outcome(theirs, expected_names)
    found = outcome(ours, names)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    compared = 0
    for key, value in expected_names.items():
        if isinstance(value, nn.Module) and key in inputs():
            pairs = zip(value.parameters(), names[key].parameters(), strict=True)
        elif isinstance(value, torch.Tensor) and key in inputs() and value.requires_grad:
            pairs = [(value, names[key])]
        else:
            continue
        for a, b in pairs:
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
                compared += 1
    assert compared


def as_on_a_gpu(package: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What lets an installed library run on a CPU."""
    if package == "open_clip":
        monkeypatch.setitem(sys.modules, "open_clip", open_clip.losses())
    if package.startswith("liger_kernel"):
        from cosup_fast.testing import interpret

        return interpret()
    if package == "cut_cross_entropy":
        import functools

        import cut_cross_entropy

        loss = functools.partial(cut_cross_entropy.linear_cross_entropy, impl="torch_compile")
        monkeypatch.setattr(cut_cross_entropy, "linear_cross_entropy", loss)
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
