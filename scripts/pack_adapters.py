"""Packs the adapters of a run for `cosup-fast data prepare`: one archive, in bf16, the same bytes every time.

    python scripts/pack_adapters.py runs/cosup-smollm2 examples/cosup-smollm2.zip

Tokenizers are left out: they are the base model's, and `data.prepared.models.build_adapters` puts them in. What it
prints is pinned in `data.prepared.catalog`.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from cosup_fast.files import sha256
from cosup_fast.training.checkpoint import chosen_checkpoint, verify

ADAPTERS = "adapter_model.safetensors"


def pack(run: Path, archive: Path) -> None:
    """Writes the archive of the run's best or newest checkpoint."""
    checkpoint = chosen_checkpoint(run)
    verify(checkpoint)
    files = {"config.yaml": (run / "config.yaml").read_bytes(), "cosup.json": (checkpoint / "cosup.json").read_bytes()}
    files["heads.safetensors"] = (checkpoint / "heads.safetensors").read_bytes()
    for part in json.loads(files["cosup.json"])["adapters"]:
        for name in ("config.json", "adapter_config.json"):
            files[f"{part}/{name}"] = (checkpoint / part / name).read_bytes()
        tensors = {name: x.to(torch.bfloat16) for name, x in load_file(checkpoint / part / ADAPTERS).items()}
        files[f"{part}/{ADAPTERS}"] = save(tensors, metadata={"format": "pt"})
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in sorted(files.items()):
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    print(f"{archive} of {checkpoint}: sha256 {sha256(archive)}, {archive.stat().st_size} bytes")


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
