"""Grounding: does the passage that a grounded segment cites entail it?

A judge reads pairs of passage and claim. `LexicalJudge` needs no model: it wants the claim's content words in two
neighbouring sentences of the passage (or its title) and looks for what word overlap hides, other numbers, other names
and a negation on one side only. `NLIJudge` asks a model for natural language inference. A claim counts as entailed or
not, as in Lee et al. 2024 and in ALCE (Gao et al. 2023, arXiv 2305.14627).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import regex
import torch

from cosup_fast.data.answers import ARTICLES, words
from cosup_fast.data.records import Passage
from cosup_fast.data.strict import Strict
from cosup_fast.evaluation.metrics import require
from cosup_fast.evaluation.pretrained import load_pretrained

_FUNCTION_WORDS = """
a about above after again against all also am among an and any are as at be because been before being below between
both but by can could did do does during each for from further had has have having he her here hers him his how i if in
into is it its itself just may me might more most must my of off on once only or other our out over own same shall she
should so some such than that the their them then there these they this those through to too under until up very was
we were what when where which while who whom whose why will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
NEGATIONS = frozenset(
    ("not", "no", "never", "none", "nor", "neither", "nobody", "nothing", "nowhere", "cannot", "without")
)
_NUMBER_WORDS = {
    word: value
    for words, start, step in (
        ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen", 0, 1),
        ("twenty thirty forty fifty sixty seventy eighty ninety", 20, 10),
        ("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth", 1, 1),
    )
    for value, word in enumerate(words.split())
    for value in [start + step * value]
}  # fmt: skip
_NUMBER_WORDS |= {"once": 1, "twice": 2, "thrice": 3, "hundred": 100, "thousand": 1000, "million": 10**6}
_NUMBER_WORDS |= {"billion": 10**9}

COVERAGE = 0.85
"""The share of a claim's content words that must be in the passage."""

_CONTRACTIONS = [
    (regex.compile(pattern, regex.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"\bcan't\b", "can not"),
        (r"\bwon't\b", "will not"),
        (r"n't\b", " not"),
        (r"'s\b", ""),
    )
]
_CLAUSE = regex.compile(r"[,;:]\s|\b(?:but|although|though|while|whereas)\b")
_SENTENCE = regex.compile(r"(?<=[.!?。！？])(?<!\b\p{Lu}\.)\s+(?=[\p{Lu}\p{N}\"“])|(?<=[。！？])|\n+|;\s")


class Verdict(Strict):
    """What a judge says of one claim."""

    entailed: bool
    score: float  # between 0 and 1
    why: str = ""


class Judge(Protocol):
    """Decides whether passages entail claims."""

    name: str

    def judge(self, pairs: Sequence[tuple[Passage, str]]) -> list[Verdict]:
        """A verdict for each pair of a passage and a claim."""
        ...


class LexicalJudge:
    """The offline judge: rules about words, numbers, names and negation; no model, English in mind.

    A claim is entailed if
    1. 85% of its content words, stemmed, are in one sentence of the passage, its neighbour or the title;
    2. each of its numbers is there (1,000 = 1000, twelve = 12, 19th = 19);
    3. each of its names (words with a capital inside a sentence) is in the passage;
    4. it and the clause that covers it best are both negated or both not.

    It knows no synonyms and no roles: true paraphrases fail and some exchanged roles ("France defeated Germany") pass.
    `docs/evaluation.md` says how often it is right on cases judged by hand.
    """

    name = "lexical"

    def judge(self, pairs: Sequence[tuple[Passage, str]]) -> list[Verdict]:
        """A verdict for each pair; `why` names what is missing.

        Raises:
            ImportError: nltk, whose Porter stemmer this uses, is not installed.
        """
        return [self._one(passage, claim) for passage, claim in pairs]

    def _one(self, passage: Passage, claim: str) -> Verdict:
        wanted = _content(claim)
        if not wanted:
            return Verdict(entailed=False, score=0.0, why="the claim has no content words")
        sentences = [s for s in _SENTENCE.split(passage.text) if s and s.strip()] or [""]
        title = set(_content(passage.title))
        held = [set(_content(sentence)) for sentence in sentences]
        windows = [title | held[i] | (held[i + 1] if i + 1 < len(held) else set()) for i in range(len(held))]
        best = max(range(len(windows)), key=lambda i: len(wanted.keys() & windows[i]))
        found = wanted.keys() & windows[best]
        score = len(found) / len(wanted)
        everywhere = title.union(*held)

        def no(why: str) -> Verdict:
            return Verdict(entailed=False, score=score, why=why)

        if lost := [word for key, word in wanted.items() if _is_number(key) and key not in windows[best]]:
            return no(f"number not in the passage: {', '.join(lost)}")
        if lost := [word for word in _names(claim) if not set(_content(word)) <= everywhere]:
            return no(f"name not in the passage: {', '.join(lost)}")
        if score < COVERAGE:
            lost = [word for key, word in wanted.items() if key not in windows[best]]
            return no(f"not in the passage, or not together: {', '.join(lost)}")
        if not _verbatim(claim, passage.text):
            clauses = [clause for sentence in sentences[best : best + 2] for clause in _CLAUSE.split(sentence)]
            nearest = max(clauses, key=lambda clause: len(wanted.keys() & set(_content(clause))))
            if _negated(claim) != _negated(nearest):
                return no(f"negated on one side only: {nearest.strip()[:200]}")
        return Verdict(entailed=True, score=score, why="its words are in the passage")


class NLIJudge:
    """A model for natural language inference, by Hugging Face name, folder or prepared name.

    - An encoder-decoder that answers 1 or 0 (google/t5_xxl_true_nli_mixture): entailed if "1" is likelier than "0" as
      first word of the answer to `premise: {title}: {text} hypothesis: {claim}` (Honovich et al. 2022, 2204.04991).
    - A sequence classifier that has a label `entailment`: entailed if that is the likeliest of its labels.

    A pair that is too long loses the tail of its passage.

    Args:
        name: which model.
        device: where it runs.
        batch_size: pairs in one forward.

    Raises:
        ValueError: the model cannot be loaded, or is neither of the two kinds.
    """

    def __init__(self, name: str, *, device: torch.device | str = "cpu", batch_size: int = 8):
        from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

        from cosup_fast.model.pretrained import read_config

        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a forward needs at least one pair")
        self.name = name
        self._batch_size = batch_size
        try:
            config = read_config(name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"judge {name!r} cannot be loaded: {error}") from error
        self._seq2seq = bool(config.is_encoder_decoder) and "SequenceClassification" not in str(config.architectures)
        if not self._seq2seq:
            labels = [(i, label) for i, label in (config.id2label or {}).items() if label.lower() == "entailment"]
            if len(labels) != 1:
                raise ValueError(
                    f"judge {name!r} has the labels {list((config.id2label or {}).values())}: expected a model for "
                    "natural language inference, with one label called entailment"
                )
            self._entailment = int(labels[0][0])
        factory = AutoModelForSeq2SeqLM if self._seq2seq else AutoModelForSequenceClassification
        self._model, self._tokenizer = load_pretrained(factory, name, device, "judge")
        limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
        longest = min([limit for limit in limits if limit], default=512)
        if not self._seq2seq and config.model_type in ("roberta", "xlm-roberta", "camembert"):
            longest -= 2  # their positions count from 2
        self._max_length = min(longest, self._tokenizer.model_max_length)
        if self._seq2seq:
            self._answers = [self._first_token(word) for word in ("0", "1")]

    @torch.inference_mode()
    def judge(self, pairs: Sequence[tuple[Passage, str]]) -> list[Verdict]:
        """A verdict for each pair; the score is the probability of entailment.

        Raises:
            ValueError: a claim that fills the model's positions by itself.
        """
        verdicts: list[Verdict | None] = [None] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0].text) + len(pairs[i][1]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            probabilities = self._forward([(_premise(pairs[i][0]), pairs[i][1]) for i in rows])
            for row, (score, entailed) in zip(rows, probabilities, strict=True):
                why = f"probability of entailment {score:.2f}"
                verdicts[row] = Verdict(entailed=entailed, score=score, why=why)
        return [verdict for verdict in verdicts if verdict is not None]

    def _forward(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        pairs = [self._shortened(premise, claim) for premise, claim in pairs]
        if self._seq2seq:
            inputs = self._tokenizer([_prompt(*pair) for pair in pairs], padding=True, return_tensors="pt")
            start = torch.full((len(pairs), 1), self._model.config.decoder_start_token_id)
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"decoder_input_ids": start}
        else:
            premises, claims = zip(*pairs)
            inputs = self._tokenizer(list(premises), list(claims), padding=True, return_tensors="pt")
        logits = self._model(**{name: x.to(self._model.device) for name, x in inputs.items()}).logits.float()
        if self._seq2seq:
            entailment = logits[:, 0, self._answers].softmax(dim=-1)[:, 1]
            return [(float(p), bool(p > 0.5)) for p in entailment]
        likeliest = logits.argmax(dim=-1) == self._entailment
        entailment = logits.softmax(dim=-1)[:, self._entailment]
        return [(float(p), bool(first)) for p, first in zip(entailment, likeliest, strict=True)]

    def _shortened(self, premise: str, claim: str) -> tuple[str, str]:
        excess = self._length(premise, claim) - self._max_length
        while excess > 0:
            tokens = self._tokenizer(premise, add_special_tokens=False)["input_ids"]
            if len(tokens) <= excess:
                raise ValueError(
                    f"the claim {claim[:60]!r} leaves no room for its passage in the {self._max_length} positions of "
                    f"judge {self.name!r}: choose another judge"
                )
            premise = str(self._tokenizer.decode(tokens[: len(tokens) - excess], skip_special_tokens=True))
            excess = self._length(premise, claim) - self._max_length
        return premise, claim

    def _length(self, premise: str, claim: str) -> int:
        texts = [_prompt(premise, claim)] if self._seq2seq else [premise, claim]
        return len(self._tokenizer(*texts, verbose=False)["input_ids"])

    def _first_token(self, word: str) -> int:
        tokens = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        if not tokens or tokens[-1] == self._tokenizer.unk_token_id:
            raise ValueError(f"judge {self.name!r} cannot answer {word!r}: expected a model that answers 1 or 0")
        return tokens[-1] if len(tokens) == 2 else tokens[0]


def _premise(passage: Passage) -> str:
    return f"{passage.title}: {passage.text}" if passage.title else passage.text


def _prompt(premise: str, claim: str) -> str:
    return f"premise: {premise} hypothesis: {claim}"


def _words(text: str) -> Iterator[tuple[str, str]]:
    """The words of a text as they stand, and in normal form; "isn't" is "is not", and a possessive 's is dropped."""
    text = text.replace("’", "'")
    for pattern, replacement in _CONTRACTIONS:
        text = pattern.sub(replacement, text)
    for word in words(text):
        yield text[word.start : word.end], word.normal


def _content(text: str) -> dict[str, str]:
    """Content words of a text: the key they are compared by -> as they stand."""
    return {
        _key(normal): word
        for word, normal in _words(text)
        if normal not in FUNCTION_WORDS and normal not in NEGATIONS and normal[0].isalnum()
    }


@cache
def _key(normal: str) -> str:
    """A number's value, or a word's stem."""
    if digits := re.match(r"\d+(?:\.\d+)*", normal):
        number = digits.group()
        return f"#{float(number):g}" if number.count(".") <= 1 else f"#{number}"
    if normal in _NUMBER_WORDS:
        return f"#{_NUMBER_WORDS[normal]}"
    return stemmer().stem(normal)


def _is_number(key: str) -> bool:
    return key.startswith("#")


def _names(claim: str) -> list[str]:
    """Words with a capital that do not begin a sentence."""
    return [
        word
        for sentence in _SENTENCE.split(claim)
        for word, normal in list(_words(sentence or ""))[1:]
        if word[0].isupper() and normal not in FUNCTION_WORDS
    ]


def _negated(text: str) -> bool:
    """Whether an odd number of negations is in a text."""
    return sum(normal in NEGATIONS for _, normal in _words(text)) % 2 == 1


def _verbatim(claim: str, text: str) -> bool:
    """Whether a claim is in a text, in whole words, with no negation in the three words before it."""
    every, wanted = ([normal for _, normal in _words(part) if normal not in ARTICLES] for part in (text, claim))
    for i in range(len(every) - len(wanted) + 1):
        if every[i : i + len(wanted)] == wanted:
            return not any(word in NEGATIONS for word in every[max(0, i - 3) : i])
    return False


@cache
def stemmer() -> Any:
    return require("nltk.stem.porter", "nltk").PorterStemmer()
