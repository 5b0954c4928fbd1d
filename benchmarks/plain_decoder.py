"""Retrieving generation as the published code does it: one request at a time, all read again after each [NSP].

It is what `cosup_fast.generation` is compared with: token by token in the tests, in seconds by generation.py. The
model runs through transformers alone, with its own cache between two retrievals (or none at all: `cache=False` reads
everything again for every token), and nothing of the library decodes here but the text template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cosup_fast.data.records import Passage
from cosup_fast.data.template import gap
from cosup_fast.generation import GenerationConfig, Retrieve
from cosup_fast.model import CoSupervisionModel


@dataclass
class PlainAnswer:
    """What was written, in tokens."""

    prompt: list[int]
    context: list[int]  # at the end; the token chosen last is not in it
    generated: list[int] = field(default_factory=list)
    found: list[Sequence[tuple[Passage, float]]] = field(default_factory=list)
    inserted: int = 0
    refed: int = 0
    processed: int = 0
    stop: str = ""
    text: str = ""


@torch.inference_mode()
def plain_decode(
    model: CoSupervisionModel,
    retrieve: Retrieve,
    config: GenerationConfig,
    question: str,
    instruction: str = "",
    *,
    forced: Mapping[int, int] | None = None,
    text_only: bool = False,
    cache: bool = True,
) -> PlainAnswer:
    """Greedy decoding, from the definition.

    Args:
        model: in evaluation mode.
        retrieve: the passages for a query.
        config: how to write; sampling is not done here.
        question: fills the template's {question}.
        instruction: fills the template's {instruction}.
        forced: tokens taken instead of chosen, by their place among those generated.
        text_only: nothing but text is chosen, so that an untrained model keeps to the forced structure.
        cache: keep keys and values between two retrievals.
    """
    template, tokenizer = model.template, model.template.tokenizer
    forced = {**(forced or {}), **({0: template.nsp} if config.ret_first else {})}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= {*tokenizer.all_special_ids, template.nsp, template.context_start, template.context_end, template.eos}
    head: Any = model.gen.get_output_embeddings()
    prompt = template.prompt(question, instruction)
    answer = PlainAnswer(prompt, list(prompt))
    inside, grounded_from, inside_length, segment = False, 0, 0, 0
    kept: DynamicCache | None = None

    def read() -> Tensor:
        """The hidden state after the last token of the context."""
        nonlocal kept
        known = 0 if kept is None else kept.get_seq_length()
        if cache and kept is None:
            kept = DynamicCache(config=model.gen.config.get_text_config())
        ids = torch.tensor([answer.context[known:]], device=model.device)
        answer.processed += ids.shape[1]
        out = model.gen.base_model(input_ids=ids, past_key_values=kept, use_cache=cache)
        return out.last_hidden_state[0, -1]

    while True:
        logits = head(read())
        structure = {template.context_end} if inside else {template.eos, template.nsp}
        if len(answer.found) == config.max_retrievals:
            structure.discard(template.nsp)
        logits[sorted(special - (set() if text_only else structure))] = -torch.inf
        logits[len(tokenizer) :] = -torch.inf
        token = forced.get(len(answer.generated), int(logits.argmax()))
        answer.generated.append(token)
        if token in (template.nsp, template.context_end):
            answer.text = _joined(answer.text, template.decode(answer.generated[segment:-1]))
            segment = len(answer.generated)
        written = _joined(answer.text, template.decode(answer.generated[segment:]))
        stops = [at for stop in config.stop if (at := written.find(stop)) >= 0]
        if token == template.eos:
            answer.stop, answer.text = "end", written
        elif stops:
            answer.stop, answer.text = "stop", written[: min(stops)]
        elif len(answer.generated) == config.max_new_tokens:
            answer.stop, answer.text = "max_new_tokens", written
        elif config.ctx_truncate and token == template.context_end:
            # The passage goes; [Cs], the grounded text and [Ce] move to its place.
            del answer.context[grounded_from : grounded_from + inside_length]
            answer.refed += len(answer.context) - grounded_from
            answer.context.append(token)
            inside, kept = False, None
            continue
        elif len(answer.context) == template.max_length:
            answer.stop, answer.text = "context_length", written
        if answer.stop:
            return answer
        answer.context.append(token)
        inside = inside and token != template.context_end
        if token == template.nsp:
            row = torch.zeros(1, dtype=torch.long)
            query = model.queries(read()[None], row)[0]
            answer.found.append(retrieve(query, config.candidates))
            passage = template.inserted_passage(answer.found[-1][0][0])
            if len(answer.context) + len(passage) + 1 > template.max_length:
                answer.stop = "context_length"
                return answer
            grounded_from, inside_length = len(answer.context), len(passage)
            answer.context += [*passage, template.context_start]
            answer.inserted += len(passage) + 1
            inside, kept = True, None


def _joined(written: str, segment: str) -> str:
    return written + gap(written, segment) + segment
