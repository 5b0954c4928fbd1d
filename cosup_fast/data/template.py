"""How an example becomes tokens: prompt, output, and `[NSP]title :: text[Cs]grounded text[Ce]` for each retrieval.

    {instruction}## Input:\\n\\n{question}## Output:\\n\\n free text [NSP]{title} :: {text}[Cs]{grounded}[Ce] ... </s>

`[NSP]` asks for a passage: the hidden state there is the query. The passage that follows is given to Gen, not
written by it, so by default its tokens carry no label. User text never becomes a special token: a passage that
contains the characters `[NSP]` is read as those five characters. Source: Lee et al. 2024, section 3 and appendix.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from string import Formatter
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from cosup_fast.data.records import Example, Passage
from cosup_fast.data.strict import Strict
from cosup_fast.errors import CosupError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NSP, CONTEXT_START, CONTEXT_END, PAD = "[NSP]", "[Cs]", "[Ce]", "[PAD]"
IGNORE = -100

# A new token's embedding starts as the mean of the embeddings of its description (Zhang et al. 2024, OneGen).
DESCRIPTIONS = {
    NSP: "search for the next passage that supports the answer",
    CONTEXT_START: "the answer begins",
    CONTEXT_END: "the answer ends",
    PAD: "nothing",
}


class TextConfig(Strict):
    """The text template and its limits; stored with every checkpoint and stamped on every index."""

    prompt: str = Field(
        default="{instruction}## Input:\n\n{question}## Output:\n\n",
        description="prompt template with the fields {instruction} and {question}",
    )
    passage: str = Field(default="{title} :: {text}", description="passage template with the fields {title} and {text}")
    max_passage_tokens: int = Field(default=512, ge=1, description="longest passage, in tokens, in Gen and in Embseq")
    long_passages: Literal["error", "truncate"] = Field(
        default="error",
        description="what a passage beyond max_passage_tokens does: stop with its id, or lose its tail",
    )
    label_passages: bool = Field(
        default=False, description="also train NTP on the inserted passages, as the paper's published code does"
    )

    @field_validator("prompt", "passage")
    @classmethod
    def _template_fields(cls, value: str, info: ValidationInfo) -> str:
        wanted = {"prompt": {"instruction", "question"}, "passage": {"title", "text"}}[str(info.field_name)]
        try:
            parsed = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(value)]
            fields = {name for name, _, _ in parsed if name is not None}
        except ValueError as error:
            raise ValueError(f"text.{info.field_name}={value!r} is not a template: {error}") from None
        if any(form or conversion for _, form, conversion in parsed):
            raise ValueError(
                f"text.{info.field_name}={value!r} says how wide a field is or how it is converted: fields stand as "
                f"they are, such as {{{min(wanted)}}}"
            )
        main = "question" if "question" in wanted else "text"
        if not fields <= wanted or main not in fields:
            raise ValueError(
                f"text.{info.field_name}={value!r} uses the fields {sorted(fields)}: "
                f"expected {{{main}}} and at most {sorted(wanted)}"
            )
        return value


class TooLongError(CosupError, ValueError):
    """An example or a passage has more tokens than a limit allows; the message names both."""


@dataclass(frozen=True)
class GenSequence:
    """One training sequence for Gen."""

    input_ids: list[int]
    labels: list[int]  # labels[t] is the token after input_ids[t], or IGNORE
    query_rows: list[int]  # positions of [NSP]
    query_passages: list[str]  # the passage each [NSP] asks for


def passage_text(template: str, title: str, text: str) -> str:
    """A passage as models and retrievers read it, without white space at its ends, which tools like to strip.

    Args:
        template: with the fields {title} and {text}.
        title: where it is blank, all that the template has on its side of the text is left out.
        text: of the passage.
    """
    if not title.strip():
        start, end = template.find("{title}"), template.index("{text}")
        template = template[end:] if -1 < start < end else template[: end + len("{text}")] if start > end else template
    return template.format(title=title, text=text).strip()


class Template:
    """Text to tokens for one pair of tokenizers.

    Args:
        config: the template.
        tokenizer: Gen's tokenizer, which must hold the special tokens (`add_special_tokens` adds them).
        embseq_tokenizer: Embseq's; Gen's when omitted.
        max_length: the longest sequence Gen takes, in tokens.
        embseq_max_length: the longest sequence Embseq takes, in tokens.

    Raises:
        ValueError: a special token is missing from Gen's tokenizer, or a tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        config: TextConfig,
        tokenizer: PreTrainedTokenizerBase,
        embseq_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_length: int = 1 << 30,
        embseq_max_length: int = 1 << 30,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.embseq_tokenizer = embseq_tokenizer or tokenizer
        self.max_length = max_length
        self.embseq_max_length = embseq_max_length
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in DESCRIPTIONS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} lacks the special tokens {', '.join(missing)}: load the "
                "model through CoSupervisionModel.from_pretrained, which adds them, or give a co-supervised checkpoint"
            )
        self.nsp, self.context_start, self.context_end, self.pad = (vocabulary[token] for token in DESCRIPTIONS)
        self.eos = _end_of_sequence(tokenizer)
        self.start = _start_of_sequence(tokenizer)
        self.embseq_end = [_end_of_sequence(self.embseq_tokenizer)]
        self.embseq_start = _start_of_sequence(self.embseq_tokenizer)

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text for Gen; the text of a special token in it stays plain text."""
        return _encode_all(self.tokenizer, [text])[0]

    def decode(self, ids: list[int]) -> str:
        """The text of Gen's tokens, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def prompt(self, question: str, instruction: str = "") -> list[int]:
        """Gen's tokens up to where the output begins."""
        return self.start + self.encode(self.config.prompt.format(instruction=instruction, question=question))

    def inserted_passage(self, passage: Passage) -> list[int]:
        """The tokens that stand between [NSP] and [Cs] in Gen's context."""
        return next(self._passages([passage], self.tokenizer))

    def sequence(self, passage: Passage) -> list[int]:
        """Embseq's tokens for a passage: the same text that is inserted, closed by the end-of-sequence token."""
        return self.sequences([passage])[0]

    def sequences(self, passages: Sequence[Passage]) -> list[list[int]]:
        """`sequence` of each passage; many at once take the tokenizer's threads."""
        sequences = []
        for passage, body in zip(passages, self._passages(passages, self.embseq_tokenizer), strict=True):
            ids = [*self.embseq_start, *body, *self.embseq_end]
            if len(ids) > self.embseq_max_length:
                raise TooLongError(
                    f"passage {passage.id!r} has {len(ids)} tokens, more than the {self.embseq_max_length} positions "
                    "of Embseq: set text.max_passage_tokens below that and text.long_passages=truncate"
                )
            sequences.append(ids)
        return sequences

    def gen_sequence(self, example: Example, passages: Mapping[str, Passage]) -> GenSequence:
        """The training sequence of an example.

        An output grounded on nothing begins with a query for the first gold passage that is known. Its text, if there
        is any, is then grounded on that passage; without text the sequence ends with the query.

        Raises:
            ValueError: an unknown passage id.
            TooLongError: a sequence longer than Gen's positions, or a passage longer than its limit.
        """
        ids = self.prompt(example.question, example.instruction)
        learned = [False] * len(ids)
        rows: list[int] = []
        wanted: list[str] = []

        def append(tokens: list[int], learn: bool = True) -> None:
            ids.extend(tokens)
            learned.extend([learn] * len(tokens))

        def ask(passage: str) -> None:
            append([self.nsp])
            rows.append(len(ids) - 1)
            wanted.append(passage)

        def ground(passage: str, texts: Iterable[str]) -> None:
            # [Cs] always follows the passage and is appended, not chosen, at inference.
            append([*self.inserted_passage(passages[passage]), self.context_start], self.config.label_passages)
            append([*chain.from_iterable(map(self.encode, texts)), self.context_end])

        pieces: list[tuple[str | None, str]] = []
        written = ""
        for segment in example.output:
            text = gap(written, segment.text) + segment.text
            written = text or written
            pieces.append((segment.passage, text))
        gold = None if example.cited else next((name for name in example.gold if name in passages), None)
        if gold is not None:
            ask(gold)
            if pieces:
                ground(gold, (text for _, text in pieces))
        else:
            for passage, text in pieces:
                if passage is None:
                    append(self.encode(text))
                    continue
                if passage not in passages:
                    raise ValueError(
                        f"example {example.id!r}: unknown passage id {passage!r}; the corpus holds {len(passages)} "
                        "passages"
                    )
                ask(passage)
                ground(passage, [text])
        if gold is None or pieces:
            append([self.eos])
        if len(ids) > self.max_length:
            raise TooLongError(
                f"example {example.id!r} has {len(ids)} tokens, more than the {self.max_length} positions of Gen: "
                "shorten it, or lower text.max_passage_tokens with text.long_passages=truncate"
            )
        labels = [token if learn else IGNORE for token, learn in zip(ids[1:], learned[1:], strict=True)] + [IGNORE]
        return GenSequence(ids, labels, rows, wanted)

    def _passages(self, passages: Sequence[Passage], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
        texts = [passage_text(self.config.passage, passage.title, passage.text) for passage in passages]
        for passage, ids in zip(passages, _encode_all(tokenizer, texts), strict=True):
            if len(ids) > self.config.max_passage_tokens:
                if self.config.long_passages == "error":
                    raise TooLongError(
                        f"passage {passage.id!r} has {len(ids)} tokens, more than text.max_passage_tokens="
                        f"{self.config.max_passage_tokens}: raise that limit, or set text.long_passages=truncate"
                    )
                ids = ids[: self.config.max_passage_tokens]
            yield ids


def gap(before: str, after: str) -> str:
    """What stands between two segments of an output where neither has white space there: a space, or nothing.

    Nothing before closing punctuation, after an opening bracket, and next to scripts that put no spaces between words.
    """
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    unspaced = any(unicodedata.east_asian_width(c) in "WF" or "\u0e00" <= c <= "\u0eff" for c in (before[-1], after[0]))
    tight = after[0] in ".,;:!?%)]}\u2019\u201d\u2026" or before[-1] in "([{\u2018\u201c"
    return "" if unspaced or tight else " "


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds [NSP], [Cs], [Ce] and [PAD] to a tokenizer; returns how many were new."""
    return tokenizer.add_special_tokens(
        {"pad_token": PAD, "additional_special_tokens": [NSP, CONTEXT_START, CONTEXT_END]}
    )


def _encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def _start_of_sequence(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer itself puts before a text ([<s>] for Llama 2, none for SmolLM2)."""
    with_start = tokenizer("a")["input_ids"]
    return with_start[:1] if with_start[:1] == [tokenizer.bos_token_id] else []


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, which closes every output and "
            "every passage: set tokenizer.eos_token and save the tokenizer again"
        )
    return eos
