"""Words as the prepared sets were made with: splitting, stemming, and finding an answer among them.

Simpler than `cosup_fast.data.answers`, the rule of metrics and mined negatives, and left as it is: another rule would
change which passages and answers a set holds, and the sets are pinned by their digests.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")
_STOPWORDS = """
a about after also an and are as at be been before being between both by called came can come could did do does during
first for from get go got had has have her his how in into is it its known last long many most much name named no not of
old on one or s t than that the their then there these this those to use used was were what when where which who whom
whose why will with would
"""
STOPWORDS = frozenset(_STOPWORDS.split())


def tokens(text: str) -> list[str]:
    """The words of a text, casefolded, accents and punctuation dropped."""
    return [_plain(word) for word in WORD.findall(text)]


def occurs(needle: Sequence[str], words: Sequence[str]) -> bool:
    """Whether the words of `needle` are in a row among `words`."""
    return _position(needle, words) is not None


def find_answer(text: str, answers: Sequence[str], answer_type: str = "string") -> str | None:
    """The longest stretch of `text` that is one of the answers, as `text` writes it; None when there is none."""
    if answer_type == "regex":
        found = [match.group() for answer in answers if (match := re.search(answer, text, re.IGNORECASE))]
    else:
        spans = [match.span() for match in WORD.finditer(text)]
        words = [_plain(text[start:end]) for start, end in spans]
        found = []
        for answer in answers:
            needle = tokens(answer)
            if (at := _position(needle, words)) is not None:
                found.append(text[spans[at][0] : spans[at + len(needle) - 1][1]])
    return max((answer for answer in found if answer.strip()), key=len, default=None)


def stem(word: str) -> str:
    """A word without a common English ending."""
    for ending in ("ing", "ies", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word


def _plain(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", word.casefold()) if not unicodedata.combining(c))


def _position(needle: Sequence[str], words: Sequence[str]) -> int | None:
    n, needle = len(needle), list(needle)
    if n:
        for i, word in enumerate(words):
            if word == needle[0] and list(words[i : i + n]) == needle:
                return i
    return None
