"""open_clip's ClipLoss: both directions, each from its own scores."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from benchmarks.cases import Case
from benchmarks.check import Loss
from benchmarks.providers import Provider


def losses() -> ModuleType:
    """Its file of losses alone: the package imports torchvision, whose builds rarely fit the torch at hand."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(case: Case) -> Loss:
    loss = losses().ClipLoss()
    return lambda x, w, target: loss(x, w, case.scale)


PROVIDERS = [Provider("open_clip", "ClipLoss", ("info-nce-symmetric",), make, "open-clip-torch")]
