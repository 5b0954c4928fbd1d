"""Generation with retrieval: Gen writes, asks for a passage with [NSP], is given it, and goes on.

1. Gen decodes until [NSP], or [NSP] is forced as its first token.
2. Gen's hidden state at [NSP] is the query; the passage whose sequence embedding has the largest inner product is
   taken from the nonparametric index.
3. The passage and [Cs] are appended; Gen writes the grounded text and [Ce], perhaps another [NSP], or ends.

`Grammar` bans what has no place in the training text. The key-value cache is kept all along: after a retrieval only
the passage and [Cs] are processed. Source: Lee et al. 2024, arXiv 2403.09024, section 3.

Shapes: T tokens, D Gen's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import DynamicCache

from cosup_fast.data.records import Passage
from cosup_fast.index import SequenceIndex, evaluation_mode

if TYPE_CHECKING:
    from cosup_fast.data.template import Template
    from cosup_fast.modeling import CoSupervisionModel

Retrieve = Callable[[Tensor, int], Sequence[tuple[Passage, float]]]
"""From a query (D,) and k to at most k passages with their scores, best first."""


class GenerationConfig(BaseModel):
    """How Gen writes, and how often it may retrieve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(
        default=256, ge=1, description="most tokens that Gen chooses; inserted passages do not count"
    )
    max_retrievals: int = Field(
        default=4, ge=0, description="[NSP] is banned after so many; 0 answers without passages"
    )
    ret_first: bool = Field(default=False, description="force [NSP] as the first token of the output")
    candidates: int = Field(
        default=5, ge=1, description="passages reported for each retrieval; only the best is inserted"
    )
    temperature: float = Field(default=0.0, ge=0, description="logits are divided by it; 0 takes the likeliest token")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="sample from the smallest set of likeliest tokens with this probability in sum",
    )
    seed: int = Field(default=0, ge=0, description="random seed of every answer when temperature > 0")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ret_first and self.max_retrievals == 0:
            raise ValueError("ret_first=true forces a retrieval and max_retrievals=0 forbids it: change one of them")
        return self


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnswerSegment(_Result):
    """A stretch of the answer: grounded on `passage` (an id), or free text when that is None."""

    text: str
    passage: str | None = None


class Candidate(_Result):
    """A passage with its score: the inner product of query and sequence embedding."""

    passage: str
    title: str
    score: float


class Retrieval(_Result):
    """One [NSP]: the passages found, best first; the first one was taken."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The passage that was taken."""
        return self.candidates[0]


class Answer(_Result):
    """What Gen wrote.

    `stop_reason` is `end` (Gen closed its output), `max_new_tokens`, or `context_length`: the next token, or the
    passage just retrieved, has no place among Gen's positions. A grounded segment that is last may then lack its end,
    and the last retrieval its segment.
    """

    text: str
    segments: tuple[AnswerSegment, ...]
    retrievals: tuple[Retrieval, ...]
    stop_reason: Literal["end", "max_new_tokens", "context_length"]
    prompt_tokens: int
    generated_tokens: int  # chosen by Gen, [NSP], [Ce] and </s> included
    inserted_tokens: int  # passages and [Cs]


class State(Enum):
    """Where in the text the next token stands."""

    FREE = "free"  # free text, [NSP] or </s>
    PASSAGE = "passage"  # after [NSP]: the passage and [Cs] are given, nothing is chosen
    GROUNDED = "grounded"  # after [Cs]: grounded text or [Ce]
    END = "end"


class Grammar:
    """Which tokens may come next, and what each of them leads to.

    FREE -text-> FREE, FREE -[NSP]-> PASSAGE, FREE -</s>-> END; PASSAGE -[Cs]-> GROUNDED; GROUNDED -text-> GROUNDED,
    GROUNDED -[Ce]-> FREE. Text is every token but the tokenizer's special ones and the rows beyond its vocabulary.

    Args:
        template: whose tokenizer says which tokens are special.
        vocabulary: V, the rows of Gen's head.
        device: where the masks are wanted.
    """

    def __init__(self, template: Template, vocabulary: int, device: torch.device | str = "cpu"):
        self.template = template
        tokenizer = template.tokenizer
        text = torch.zeros(vocabulary, dtype=torch.bool)
        text[: len(tokenizer)] = True
        text[[token for token, added in tokenizer.added_tokens_decoder.items() if added.special]] = False
        text[[*tokenizer.all_special_ids, template.nsp, template.context_start, template.context_end]] = False
        text[[template.pad, template.eos]] = False

        def also(*tokens: int) -> Tensor:
            mask = text.clone()
            mask[list(tokens)] = True
            return mask.to(device)

        self._free = also(template.eos)
        self._free_or_retrieve = also(template.eos, template.nsp)
        self._grounded = also(template.context_end)

    def allowed(self, state: State, may_retrieve: bool) -> Tensor:
        """The tokens that may be chosen in a state, (V,) bool; `may_retrieve` admits [NSP] in free text."""
        if state is State.FREE:
            return self._free_or_retrieve if may_retrieve else self._free
        assert state is State.GROUNDED, f"nothing is chosen in {state}"
        return self._grounded

    def next(self, state: State, token: int) -> State:
        """The state after a token that was allowed in `state`."""
        match state:
            case State.FREE if token == self.template.nsp:
                return State.PASSAGE
            case State.FREE if token == self.template.eos:
                return State.END
            case State.PASSAGE if token == self.template.context_start:
                return State.GROUNDED
            case State.GROUNDED if token == self.template.context_end:
                return State.FREE
        return state


class Generator:
    """Answers questions with a co-supervised model and an index.

    Args:
        model: Gen and Embseq.
        index: the index that this model built, or any `retrieve(query, k)`: a fixed passage for every query gives
            the given-passage baseline, and `max_retrievals=0` the closed-book one.
        config: how to write.
    """

    def __init__(
        self, model: CoSupervisionModel, index: SequenceIndex | Retrieve, config: GenerationConfig | None = None
    ):
        self.model = model
        self.config = config or GenerationConfig()
        self._retrieve: Retrieve = index.retrieve if isinstance(index, SequenceIndex) else index
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
        prompt = self._prompt(question, instruction)
        with evaluation_mode(self.model):
            return self._decode(prompt, on_text or (lambda piece: None))

    def query(self, question: str, instruction: str = "") -> Tensor:
        """The query (D,) of an output that begins with [NSP], from one forward: to search an index and write nothing.

        Args:
            question: fills the template's {question}.
            instruction: fills the template's {instruction}.

        Raises:
            ValueError: the prompt and [NSP] are longer than Gen's positions.
        """
        tokens = self._prompt(question, instruction, self.model.template.nsp)
        with evaluation_mode(self.model):
            return self._query(self._forward(tokens, None))

    def _prompt(self, question: str, instruction: str, *more: int) -> list[int]:
        template = self.model.template
        tokens = [*template.prompt(question, instruction), *more]
        if len(tokens) > template.max_length:
            raise ValueError(
                f"the prompt of the question {question[:60]!r} has {len(tokens)} tokens, more than the "
                f"{template.max_length} positions of Gen: shorten the question or the instruction"
            )
        return tokens

    def _decode(self, prompt: list[int], on_text: Callable[[str], None]) -> Answer:
        template, config, grammar = self.model.template, self.config, self._grammar
        cache = DynamicCache(config=self.model.gen.config.get_text_config())
        random = torch.Generator().manual_seed(config.seed)
        written = _Transcript(template, on_text)
        retrievals: list[Retrieval] = []
        generated, inserted = 0, 0

        def room(tokens: int) -> bool:
            return cache.get_seq_length() + tokens <= template.max_length

        state, hidden = State.FREE, self._forward(prompt, cache)
        while True:
            if config.ret_first and generated == 0:
                token = template.nsp
            else:
                allowed = grammar.allowed(state, len(retrievals) < config.max_retrievals)
                token = self._choose(hidden, allowed, random)
            generated += 1
            before, state = state, grammar.next(state, token)
            if state is before:
                written.text(token)
            elif before is State.GROUNDED:
                written.close()
            if state is State.END:
                stop = "end"
                break
            if generated == config.max_new_tokens:
                stop = "max_new_tokens"
                break
            if not room(1):
                stop = "context_length"
                break
            hidden = self._forward([token], cache)
            if state is State.PASSAGE:
                found = self._retrieve(self._query(hidden), config.candidates)
                if not found:
                    raise ValueError("the index gave no passage for a query: it needs at least one")
                retrievals.append(
                    Retrieval(
                        candidates=tuple(Candidate(passage=p.id, title=p.title, score=score) for p, score in found)
                    )
                )
                given = [*template.inserted_passage(found[0][0]), template.context_start]
                if not room(len(given)):
                    stop = "context_length"
                    break
                hidden = self._forward(given, cache)
                inserted += len(given)
                state = grammar.next(state, template.context_start)
                written.open(found[0][0].id)
        segments = written.finish()
        return Answer(
            text="".join(segment.text for segment in segments),
            segments=segments,
            retrievals=tuple(retrievals),
            stop_reason=stop,
            prompt_tokens=len(prompt),
            generated_tokens=generated,
            inserted_tokens=inserted,
        )

    def _forward(self, tokens: list[int], cache: DynamicCache | None) -> Tensor:
        """Gen's hidden state (D,) after the last of the tokens, which go on from the cache, if there is one."""
        ids = torch.tensor([tokens], device=self.model.device)
        out = self.model.gen.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        return out.last_hidden_state[0, -1]

    def _query(self, hidden: Tensor) -> Tensor:
        row = torch.zeros(1, dtype=torch.long, device=hidden.device)
        return self.model.queries(hidden[None], row)[0]

    def _choose(self, hidden: Tensor, allowed: Tensor, random: torch.Generator) -> int:
        logits = self.model.logits(hidden)
        if logits.isnan().any():
            raise ValueError("Gen's logits are not numbers: the weights are damaged, or training diverged")
        return choose(logits.masked_fill(~allowed, -torch.inf), self.config, random)


def choose(logits: Tensor, config: GenerationConfig, random: torch.Generator) -> int:
    """A token from logits (V,): the likeliest, or one sampled by `temperature` and `top_p` (Holtzman et al. 2020)."""
    if config.temperature == 0:
        return int(logits.argmax())
    # On the CPU and in fp64: the same seed gives the same tokens on every device.
    logits = logits.double().cpu()
    probability = torch.softmax((logits - logits.max()) / config.temperature, dim=-1)
    ordered, tokens = probability.sort(descending=True, stable=True)
    ordered[ordered.cumsum(dim=-1) - ordered >= config.top_p] = 0
    return int(tokens[torch.multinomial(ordered, 1, generator=random)])


class _Transcript:
    """Tokens to segments, and to text as soon as it is certain."""

    def __init__(self, template: Template, on_text: Callable[[str], None]):
        self._template = template
        self._on_text = on_text
        self._segments: list[AnswerSegment] = []
        self._passage: str | None = None
        self._tokens: list[int] = []
        self._sent = 0

    def text(self, token: int) -> None:
        """A token of the current segment."""
        self._tokens.append(token)
        # A character of several bytes may come in several tokens; until it is whole it decodes to U+FFFD.
        self._send(self._template.decode(self._tokens).rstrip("\ufffd"))

    def open(self, passage: str) -> None:
        """The next segment is grounded on a passage."""
        self.close()
        self._passage = passage

    def close(self) -> None:
        """The current segment is complete; free text follows. A grounded segment may be empty, a free one is not."""
        if self._tokens or self._passage is not None:
            text = self._template.decode(self._tokens)
            self._send(text)
            self._segments.append(AnswerSegment(text=text, passage=self._passage))
        self._passage, self._tokens, self._sent = None, [], 0

    def finish(self) -> tuple[AnswerSegment, ...]:
        """All segments."""
        self.close()
        return tuple(self._segments)

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self._on_text(text[self._sent :])
            self._sent = len(text)
