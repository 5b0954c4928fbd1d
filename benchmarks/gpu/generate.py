"""Generation with retrieval on a GPU: tokens/s of the batched decoder, SmolLM2-135M's shape, random weights."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.generation import TextOnly, by_random_vectors, schedule
from benchmarks.gpu.limits import synchronize
from benchmarks.gpu.session import Setting
from benchmarks.gpu.steps import TINY
from cosup_fast.config.generation import GenerationConfig
from cosup_fast.config.model import NSPConfig
from cosup_fast.data.records import Passage
from cosup_fast.data.template import Template, TextConfig, add_special_tokens
from cosup_fast.generation import Decoder, Request
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.attention import choose_attention
from cosup_fast.plan.configs import model_config

PASSAGES = 1000


def measure(batch: int, setting: Setting, seconds: float) -> dict[str, Any]:
    """Tokens that are written a second by so many requests at once, two retrievals each, greedily in bf16."""
    generated, words = setting.size(120, 12), setting.size(100, 3)
    model = make_model(setting)
    passages = [Passage(id=f"p{i}", title=f"Passage {i}", text="word " * words) for i in range(PASSAGES)]
    retrieve, forced = by_random_vectors(model, passages), schedule(model, generated)
    grammar = TextOnly(model.template, model.vocabulary, model.device)
    config = GenerationConfig(max_new_tokens=generated)

    def once() -> tuple[float, int]:
        decoder = Decoder(model, retrieve, config, max_batch=batch, grammar=grammar)
        tickets = [decoder.submit(Request(f"Question {i}?", forced=forced)) for i in range(batch)]
        synchronize(setting)
        begin = time.perf_counter()
        for _ in decoder.run():
            pass
        synchronize(setting)
        elapsed = time.perf_counter() - begin
        answers = [ticket.result() for ticket in tickets]
        assert all(len(answer.retrievals) == 2 for answer in answers)
        return elapsed, sum(answer.generated_tokens for answer in answers)

    end_of_time = time.monotonic() + 0.7 * seconds
    warm_up, written = once()
    times = []
    while not times or (len(times) < 5 and time.monotonic() + times[-1] < end_of_time):
        elapsed, written = once()
        times.append(elapsed)
    return {
        "requests": batch, "passages": PASSAGES, "generated": written, "warm_up_seconds": warm_up, "seconds": times,
        "tokens/s": written / median(times), "attention": model.gen.config._attn_implementation,
    }  # fmt: skip


def make_model(setting: Setting) -> CoSupervisionModel:
    """One model that is Gen and Embseq, with a tokenizer of single bytes."""
    config = AutoConfig.for_model(
        **setting.size(model_config("smollm2-135m"), {**TINY, "max_position_embeddings": 512})
    )
    device, dtype = torch.device(setting.device), setting.size(torch.bfloat16, torch.float32)
    template = Template(TextConfig(), tokenizer := make_tokenizer())
    with device:
        gen = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=choose_attention("auto", device)
        )
    gen.resize_token_embeddings(max(len(tokenizer), config.vocab_size), mean_resizing=False)
    gen.config.pad_token_id = template.pad
    return CoSupervisionModel(gen.to(device, dtype), None, template, NSPConfig()).to(device).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte of a text is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<s>", "</s>", *alphabet])}
    bytes_alone = Tokenizer(models.BPE(vocabulary, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )  # fmt: skip
    add_special_tokens(made)
    return made
