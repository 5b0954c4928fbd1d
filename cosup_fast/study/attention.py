"""Whether Gen looks at the passage that was inserted while it writes the answer, layer by layer.

The gold answer is teacher-forced on the gold passage: prompt, [NSP], passage, [Cs], answer. At the positions that
predict the answer's tokens, the attention weights of a layer are averaged over heads, positions and questions:

    passage  sum over the passage's tokens          answer  over those of them that spell the answer
    prompt   over instruction and question          even    what `passage` is where all tokens before count alike

`answer` and `passage` are compared with `even`: a layer that looks nowhere in particular has that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from cosup_fast.data.answers import answer_spans
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.data.template import passage_text
from cosup_fast.evaluation import Corpus, TestSet
from cosup_fast.index.embed import evaluation_mode
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.attention import attending
from cosup_fast.study.handed import readable

QUESTIONS = 64
SHARES = ("passage", "answer", "prompt")


@torch.inference_mode()
def attention_by_layer(
    model: CoSupervisionModel, tests: Sequence[TestSet], corpora: Mapping[str, Corpus], limit: int = QUESTIONS
) -> dict[str, Any]:
    """The shares by layer, of up to `limit` questions taken from the sets in turn.

    Raises:
        ValueError: no set has a question whose answer is in what Gen reads of its gold passage.
    """
    sums: dict[str, torch.Tensor] = {}
    even, count = 0.0, 0
    with evaluation_mode(model), attending(model.gen.base_model, "eager"):
        for example, passage in _in_turn(tests, corpora, model, limit):
            layout = Layout(model, example, passage)
            found = model.gen.base_model(
                input_ids=torch.tensor([layout.ids], device=model.device), use_cache=False, output_attentions=True
            ).attentions
            heads = torch.stack([layer[0, :, layout.rows].float().mean(dim=(0, 1)) for layer in found])  # (layers, T)
            for name in SHARES:
                sums[name] = sums.get(name, 0) + heads[:, getattr(layout, name)].sum(dim=1).double().cpu()
            even += sum(len(layout.passage) / (row + 1) for row in layout.rows) / len(layout.rows)
            count += 1
    if not count:
        raise ValueError("attention: no test set has a question whose answer is in its gold passage: name another")
    by_layer = {name: [round(x, 5) for x in (total / count).tolist()] for name, total in sums.items()}
    return {"questions": count, "even": round(even / count, 5), "by_layer": by_layer}


class Layout:
    """Tokens of a teacher-forced answer, and which of them are what."""

    def __init__(self, model: CoSupervisionModel, example: Example, passage: Passage):
        template = model.template
        segment = Segment(text=example.answers[0], passage=passage.id)
        sequence = template.gen_sequence(example.model_copy(update={"output": [segment]}), {passage.id: passage})
        asked = sequence.query_rows[0]
        start = sequence.input_ids.index(template.context_start, asked)
        self.ids = sequence.input_ids[: sequence.input_ids.index(template.context_end, start)]
        self.rows = list(range(start, len(self.ids) - 1))  # each predicts a token of the answer
        self.prompt = list(range(asked))
        self.passage = list(range(asked + 1, start))
        text = passage_text(template.config.passage, passage.title, passage.text)
        spans = answer_spans(text, example)
        offsets = template.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
        self.answer = [
            place
            for place, (begin, end) in zip(self.passage, offsets, strict=False)
            if any(begin < stop and first < end for first, stop in spans)
        ]


def _in_turn(
    tests: Sequence[TestSet], corpora: Mapping[str, Corpus], model: CoSupervisionModel, limit: int
) -> Iterator[tuple[Example, Passage]]:
    """The readable questions of every set, the first of each, then the second."""
    found = 0
    rows = [readable(test, corpora[test.corpus], model.template) for test in tests]
    for row in zip_longest(*rows):
        for test, example in zip(tests, row, strict=True):
            if example is not None and found < limit:
                found += 1
                corpus = corpora[test.corpus]
                yield example, corpus.by_id[corpus.found(example.gold)[0]]
        if found >= limit:
            return
