"""Chains: questions of several parts, whose outputs retrieve one to three times with free text between.

    fill       Kabul is the capital and largest city of ____. Fill the gap and say more about it.
               [NSP]Kabul[Cs]Kabul is the capital ...[Ce] It is Afghanistan. [NSP]Afghanistan[Cs]Afghanistan is ...[Ce]
    mention    Describe Kabul, then something that its description mentions.
    compare    Compare the rivers Seine and Nile.
    list       Name three German mathematicians, with a sentence on each.
    describe   What is Kabul?

Every grounded text is a whole sentence of its passage. In the first two forms the second query can only come from what
was just written, as in the outputs that the method was published with.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cosup_fast.data.prepared.questions import BLANK, sentences
from cosup_fast.data.prepared.spans import WORDS, draw
from cosup_fast.data.prepared.words import occurs, tokens
from cosup_fast.data.records import Example, Passage, Segment

LONG = 8  # letters of a name that may be written in lower case
MOST = 6  # uses of one passage as the second of two; without a limit half of the chains would end at a country

_KIND_WORDS = """
    actor actress anthropologist archipelago architect artist author bird caliph chemist city clade composer country
    dancer deity dynasty economist element emperor empire engineer explorer filmmaker fish fruit game general god
    goddess historian instrument inventor island journalist kingdom lake language mammal mathematician monk mountain
    musician naturalist novelist organ organelle painter peninsula philosopher physician physicist planet playwright
    poet politician polymath province psychologist religion revolutionary river sea singer singer-songwriter sport
    statesman strait sultan theologian university vegetable vehicle
"""
_KINDS = frozenset(_KIND_WORDS.split())
_COMPOUNDS = frozenset(
    (
        "archipelagic country", "capital city", "chemical element", "civil war", "electronic device", "flowering plant",
        "island country", "landlocked country", "language family", "marginal sea", "mountain range",
        "musical instrument", "port city", "volcanic island",
    )
)  # fmt: skip
_KIND = re.compile(
    r"\b(?:is|was|are|were) (?:an?|the|one of the) ((?:[\w’'-]+ ){0,3}?[\w’'-]+?)"
    r"(?=,| (?:of|in|that|which|who|whose|and|or|by|for|from|with|on|at|to|known|located|native|where|as|during|between"
    r"|within)\b|[.;:(])"
)
_WORD = re.compile(r"[\w’'-]+")

_BEFORE, _AFTER = re.compile(r"\S\s[A-Z][\w’'-]*\s$"), re.compile(r"\s[A-Z]")  # where a name continues

_FILL = (
    "{masked} Fill the gap and say more about it.",
    "{masked} What is missing here, and what is it?",
    "Complete this and explain what was missing: {masked}",
    "{masked} What belongs in the blank? Give a sentence on it too.",
)
_FILLED = ("The gap: {name}.", "Missing is {name}.", "Answer: {name}.", "{name} belongs in the gap.")
_MENTIONS = (
    "Describe {first}, then something that its description mentions.",
    "Tell me about {first} and about one thing connected with it.",
    "Give a sentence on {first}, and explain a name that comes up in it.",
)
_MENTIONED = ("This mentions {name}.", "One name here is {name}.", "Connected with it is {name}.")
_COMPARE = (
    "Compare {first} and {second}.",
    "How does {first} differ from {second}?",
    "What do you know about {first}, and about {second}?",
    "{first} or {second}: what is each?",
)
_FIRST = ("Take {name} first.", "First, {name}.", "About {name}:", "{name}:")
_SECOND = ("Now {name}.", "Then {name}.", "As for {name}:", "{name}, on the other hand:")
_LIST = (
    "Name {count} {kinds}, with a sentence on each.",
    "List {count} {kinds} and say something about each.",
    "Give {count} examples of {kinds}.",
)
_ITEMS = ("One is {name}.", "Another is {name}.", "A third is {name}.")
_DESCRIBE = ("{be} {name}?", "Describe {name}.", "Tell me about {name} in one sentence.")


@dataclass(frozen=True)
class Lead:
    """A passage with the sentences that begin a lead, as many as end within its first `WORDS` words or so."""

    passage: Passage
    name: str
    said: list[str]

    @property
    def first(self) -> str:
        return self.said[0]


def make_chains(passages: Iterable[Passage]) -> Iterator[Example]:
    """Chains over these passages alone, which are those of one split."""
    leads = {passage.id: lead for passage in passages if (lead := _lead(passage))}
    yield from _bridges(leads)
    yield from _groups(leads)
    for lead in leads.values():
        if draw(f"describe {lead.passage.id}") % 10 == 0:
            be = "Who was" if lead.passage.topic == "People" else "What is"
            question = _pick(_DESCRIBE, lead.passage.id).format(be=be, name=lead.name)
            yield _example("describe", [lead], question, [_grounded(lead, lead.first)])


def _lead(passage: Passage) -> Lead | None:
    said, count = [], 0
    for sentence in sentences(passage.text):
        count += len(sentence.split())
        if count > WORDS:
            break
        said.append(sentence)
    named = "(" not in passage.title and passage.title[:1].isupper() and len(passage.title) > 3
    return Lead(passage, passage.title, said) if said and named else None


def _bridges(leads: dict[str, Lead]) -> Iterator[Example]:
    """A lead with another that it names."""
    by_name = {lead.name: lead for lead in leads.values()}
    used: Counter[str] = Counter()
    for lead in sorted(leads.values(), key=lambda lead: draw(f"bridge {lead.passage.id}")):
        choices = []
        for sentence in lead.said[:2]:
            for start, end, other in _mentions(sentence, by_name):
                if set(tokens(other.name)) & set(tokens(lead.name)) or used[other.name] >= MOST:
                    continue
                masked = sentence[:start] + BLANK + sentence[end:]
                if not occurs(tokens(other.name), tokens(masked)):
                    choices.append((used[other.name], start, sentence, masked, other))
        if not choices:
            continue
        _, _, sentence, masked, other = min(choices, key=lambda choice: choice[:2])
        used[other.name] += 1
        fill = draw(f"form {lead.passage.id}") % 4 > 0
        if not occurs(tokens(lead.name), tokens(masked)):
            masked = f"{lead.name}: {masked}"
        question = _pick(_FILL if fill else _MENTIONS, lead.passage.id).format(masked=masked, first=lead.name)
        link = _pick(_FILLED if fill else _MENTIONED, lead.passage.id).format(name=other.name)
        output = [_grounded(lead, sentence), Segment(text=link), _grounded(other, other.first)]
        yield _example("fill" if fill else "mention", [lead, other], question, output, (other.name,) if fill else ())


def _mentions(sentence: str, by_name: dict[str, Lead]) -> Iterator[tuple[int, int, Lead]]:
    """Where a sentence names other leads, the longest name at each place; a long name may be in lower case."""
    words = list(_WORD.finditer(sentence))
    after = 0
    for i, word in enumerate(words):
        for last in reversed(words[i : i + 5]):
            said = sentence[word.start() : last.end()]
            other = by_name.get(said) or (by_name.get(said[:1].upper() + said[1:]) if len(said) >= LONG else None)
            if other and i >= after:
                after = i + len(_WORD.findall(said))
                # Part of a longer name is another thing: no Land in the Holy Land.
                if not (
                    said[0].isupper()
                    and (_BEFORE.search(sentence[: word.start()]) or _AFTER.match(sentence[last.end() :]))
                ):
                    yield word.start(), last.end(), other
                break


def _groups(leads: dict[str, Lead]) -> Iterator[Example]:
    """Leads of things of one kind, in pairs that are compared and triples that are listed."""
    kinds: dict[str, list[Lead]] = defaultdict(list)
    for lead in leads.values():
        if kind := _kind(lead.first):
            kinds[kind].append(lead)
    for kind, group in sorted(kinds.items()):
        group = sorted(group, key=lambda lead: draw(f"{kind} {lead.passage.id}"))
        for first, second in zip(group[::2], group[1::2], strict=False):
            key = f"{first.passage.id} {second.passage.id}"
            question = _pick(_COMPARE, key).format(first=first.name, second=second.name)
            yield _example("compare", [first, second], question, [
                Segment(text=_pick(_FIRST, key).format(name=first.name)),
                _grounded(first, first.first),
                Segment(text=_pick(_SECOND, key).format(name=second.name)),
                _grounded(second, second.first),
            ])  # fmt: skip
        group = sorted(group, key=lambda lead: draw(f"list {kind} {lead.passage.id}"))
        for at in range(0, len(group) - 2, 3):
            key = f"{kind} {at}"
            chosen = group[at : at + (2 if draw(key) % 3 == 0 else 3)]
            if draw(key) % 2 or len(kinds[kind]) < 3:
                continue
            count = "two" if len(chosen) == 2 else "three"
            question = _pick(_LIST, key).format(count=count, kinds=_plural(kind))
            output = []
            for item, lead in zip(_ITEMS, chosen):
                output += [Segment(text=item.format(name=lead.name)), _grounded(lead, lead.first)]
            yield _example("list", chosen, question, output)


def _kind(sentence: str) -> str | None:
    """What a lead's first sentence says that its subject is: `river`, `German mathematician`."""
    match = _KIND.search(sentence)
    words = match.group(1).split() if match else []
    if " ".join(words[-2:]) in _COMPOUNDS:
        return " ".join(words[-2:])
    if not words or words[-1] not in _KINDS:
        return None
    return " ".join(words[-2:]) if len(words) > 1 and words[-2][0].isupper() else words[-1]


def _plural(kind: str) -> str:
    if kind.endswith("man"):
        return f"{kind[:-3]}men"
    if kind.endswith("y") and kind[-2] not in "aeiou":
        return f"{kind[:-1]}ies"
    return kind if kind.endswith("fish") else f"{kind}es" if kind.endswith(("s", "x", "ch", "sh")) else f"{kind}s"


def _grounded(lead: Lead, sentence: str) -> Segment:
    assert sentence in lead.passage.text, lead.passage.id
    return Segment(text=sentence, passage=lead.passage.id)


def _example(
    form: str, leads: list[Lead], question: str, output: list[Segment], answers: tuple[str, ...] = ()
) -> Example:
    name = "+".join(lead.passage.id.removeprefix("wiki:") for lead in leads)
    return Example(
        id=f"chain-{form}-{name}",
        dataset="chains",
        question=" ".join(question.split()),
        output=output,
        answers=list(answers),
    )


def _pick(templates: tuple[str, ...], key: str) -> str:
    return templates[draw(key) % len(templates)]
