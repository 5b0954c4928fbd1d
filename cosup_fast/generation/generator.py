"""Questions to answers, with a co-supervised model and an index."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosup_fast.config.generation import GenerationConfig
from cosup_fast.generation.answer import Answer
from cosup_fast.generation.cache import Chunk
from cosup_fast.generation.decoder import Decoder, Ticket
from cosup_fast.generation.grammar import Grammar
from cosup_fast.generation.request import Index, Request
from cosup_fast.generation.runner import Runner
from cosup_fast.generation.task import prompt_tokens

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel


class Generator:
    """Answers questions with a co-supervised model and an index.

    Args:
        model: Gen and Embseq.
        index: the index that this model built, or any `retrieve(query, k)`: a fixed passage for every query gives
            the given-passage baseline, and `max_retrievals=0` the closed-book one.
        config: how to write.
        max_batch: requests that `generate_all` answers at once. Each needs memory for the keys and values of its
            whole context.
        step_tokens: most tokens of prompts and passages that one forward reads.
    """

    def __init__(
        self,
        model: CoSupervisionModel,
        index: Index,
        config: GenerationConfig | None = None,
        *,
        max_batch: int = 16,
        step_tokens: int = 512,
    ):
        self.model = model
        self.config = config or GenerationConfig()
        self._index = index
        self._max_batch = max_batch
        self._step_tokens = step_tokens
        self._grammar = Grammar(model.template, model.vocabulary, model.device)

    def generate(self, question: str, instruction: str = "", on_text: Callable[[str], None] | None = None) -> Answer:
        """Writes one answer.

        Args:
            question: fills the template's {question}.
            instruction: fills the template's {instruction}.
            on_text: called with each new piece of the answer's text; the pieces together are `Answer.text`.

        Raises:
            ValueError: the prompt is longer than Gen's positions, a passage found is too long for the template,
                nothing was found, or Gen's logits are not numbers.
        """
        decoder = self.decoder(1)
        ticket = decoder.submit(Request(question, instruction), on_text)
        for ended in decoder.run():
            assert ended is ticket
        return ticket.result()

    def generate_all(
        self,
        requests: Iterable[Request | str],
        *,
        on_text: Callable[[int, str], None] | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answers many requests, `max_batch` at once: one that ends makes room for the next.

        An error ends its own request alone: look at `Answer.error`.

        Args:
            requests: questions; they are asked for when there is room for them.
            on_text: called with the number of a request and each new piece of its answer's text.
            on_answer: called with the number of a request and its answer, as soon as it is complete.

        Returns:
            The answers, in the order of the requests.
        """
        decoder = self.decoder(self._max_batch)
        source = enumerate(requests)
        numbers: dict[Ticket, int] = {}
        answers: dict[int, Answer] = {}
        more = True
        while more or not decoder.idle:
            while more and decoder.free:
                number, request = next(source, (-1, ""))
                if more := number >= 0:
                    request = Request(request) if isinstance(request, str) else request
                    numbers[decoder.submit(request, _numbered(on_text, number))] = number
            for ticket in decoder.step():
                number = numbers.pop(ticket)
                assert ticket.answer is not None
                answers[number] = ticket.answer
                if on_answer is not None:
                    on_answer(number, ticket.answer)
        return [answers[number] for number in sorted(answers)]

    def decoder(self, max_batch: int | None = None) -> Decoder:
        """A decoder for requests that come and go: submit, step, cancel.

        Args:
            max_batch: requests at once; the generator's when omitted.
        """
        return Decoder(
            self.model,
            self._index,
            self.config,
            max_batch=max_batch or self._max_batch,
            step_tokens=self._step_tokens,
            grammar=self._grammar,
        )

    def query(self, question: str, instruction: str = "") -> Tensor:
        """The query (D,) of an output that begins with [NSP], from one forward: to search an index and write nothing.

        Args:
            question: fills the template's {question}.
            instruction: fills the template's {instruction}.

        Raises:
            ValueError: the prompt and [NSP] are longer than Gen's positions.
        """
        template = self.model.template
        hidden = Runner(self.model, 1).read([Chunk(0, 0, prompt_tokens(template, question, instruction, template.nsp))])
        with torch.inference_mode():
            return self.model.queries(hidden, torch.zeros(1, dtype=torch.long, device=hidden.device))[0]


def _numbered(on_text: Callable[[int, str], None] | None, number: int) -> Callable[[str], None] | None:
    return None if on_text is None else lambda piece: on_text(number, piece)
