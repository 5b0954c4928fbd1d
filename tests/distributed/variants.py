"""What a step is computed with, by name."""

from __future__ import annotations

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
