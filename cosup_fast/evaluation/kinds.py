"""The table of systems: how each is named, what Gen is given, and what that needs.

Error text, the help of `cosup-fast evaluate` and the table in docs/evaluation.md come from here. Nothing heavy is
imported, so that help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cosup_fast.data.records import nearest


@dataclass(frozen=True)
class Kind:
    """A row of the table of systems.

    Args:
        name: what `--system` calls it.
        retrieves: what Gen is given, for help and docs.
        reads: what has to be there besides the checkpoint.
        argument: what follows the colon, if anything does.
        default: that argument when it is left out; without a default it is required.
    """

    name: str
    retrieves: str
    reads: Literal["index", "corpus", ""]
    argument: str = ""
    default: str = ""

    @property
    def form(self) -> str:
        """How it is written: `dense:NAME`."""
        return f"{self.name}:{self.argument}" if self.argument else self.name


SYSTEMS = {
    kind.name: kind
    for kind in (
        Kind("co-supervised", "what Gen's own queries find in the index of its Embseq", "index"),
        Kind("closed-book", "nothing", ""),
        Kind("gold", "the gold passages, in order", "corpus"),
        Kind("random", "passages drawn by `--seed`", "corpus"),
        Kind("bm25", "what BM25 (bm25s) finds with the question and the text written so far", "corpus"),
        Kind(
            "dense",
            "what a sentence-transformers model finds with the question and the text written so far; `dense:minilm` "
            "is prepared by `cosup-fast data prepare minilm`",
            "corpus",
            argument="NAME",
            default="minilm",
        ),
        Kind(
            "pair",
            "what another run finds: its Gen reads the same text and makes the query, its Embseq made the index",
            "index",
            argument="RUN",
        ),
        Kind("untrained", "what the run's model finds before training, which writes, too", "corpus"),
    )
}
"""Every system, by what its name begins with."""

_READS = {"index": "its index, or `--corpus`", "corpus": "`--corpus`", "": ""}


def forms() -> str:
    """All systems as they are written, for help and errors."""
    names = [kind.form for kind in SYSTEMS.values()]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def split_name(name: str) -> tuple[Kind, str]:
    """The kind of a system and what follows its colon: `dense` gives that of `dense:NAME` and `minilm`.

    Raises:
        ValueError: there is no such kind, its argument is missing, or it takes none.
    """
    first, _, argument = name.partition(":")
    if first not in SYSTEMS:
        raise ValueError(f"--system {name!r} is unknown{nearest(first, SYSTEMS)}: expected {forms()}")
    kind = SYSTEMS[first]
    argument = argument or kind.default
    if kind.argument and not argument:
        raise ValueError(f"--system {name!r} needs its {kind.argument}: write {kind.form}")
    if argument and not kind.argument:
        raise ValueError(f"--system {name!r}: {kind.name} takes nothing after a colon")
    return kind, argument


def table() -> str:
    """The table of docs/evaluation.md."""
    rows = [f"| `{kind.form}` | {kind.retrieves} | {_READS[kind.reads]} |" for kind in SYSTEMS.values()]
    return "\n".join(["| `--system` | Gen is given | reads |", "|---|---|---|", *rows])
