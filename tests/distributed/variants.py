"""What a step is computed with, by name, and the model of such settings."""

from __future__ import annotations

import json

import torch

from cosup_fast.config.model import ModelConfig, NSPConfig, NTPConfig
from cosup_fast.data.template import TextConfig
from cosup_fast.model import CoSupervisionModel

VARIANTS = {
    "pair": {},
    "shared": {"model": {"shared": True}},
    "projected, learnt temperature": {"model": {"embseq": "gpt2"}, "nsp": {"learnable_temperature": True}},
    "frozen": {"model": {"freeze_embseq": True}},
    "symmetric": {"nsp": {"symmetric": True, "label_smoothing": 0.1}},
    "no NSP": {"nsp": {"weight": 0.0}},
    "no NTP": {"ntp": {"weight": 0.0}},
    "adapters": {"model": {"gen_lora": {"rank": 4}, "embseq_lora": {"rank": 2}}},
    "adapters of Gen": {"model": {"gen_lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}}},
}


def build(settings: str, device: str = "cpu") -> CoSupervisionModel:
    """The model of a JSON text: sections model, nsp, ntp."""
    sections = json.loads(settings)
    torch.manual_seed(0)
    parts, nsp = ModelConfig(**sections["model"]), NSPConfig(**sections.get("nsp", {}))
    ntp = NTPConfig(**sections.get("ntp", {}))
    return CoSupervisionModel.from_pretrained(parts, TextConfig(), nsp, ntp=ntp, device=device).eval()
