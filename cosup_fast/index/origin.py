"""What made an index, and the stamp that says so; no index is searched with another model's queries by accident."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, ValidationError

from cosup_fast.data.strict import Strict, first_problem
from cosup_fast.data.template import TextConfig
from cosup_fast.files import FolderKind, read_object, replace_file
from cosup_fast.index.embed import Precision

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

FORMAT_VERSION = 2
STAMP = "index.json"


class Origin(Strict):
    """What decides the embeddings of an index."""

    text: TextConfig
    similarity: str
    fingerprint: str

    @classmethod
    def of(cls, model: CoSupervisionModel) -> Self:
        """The template, the similarity and the fingerprint of a model; the latter reads all its weights."""
        return cls(text=model.template.config, similarity=model.nsp.similarity, fingerprint=model.fingerprint())

    def difference(self, model: Origin) -> str:
        """How an index's origin differs from a model's, the cause first; nothing when they agree."""
        for name in TextConfig.model_fields:
            theirs, ours = getattr(self.text, name), getattr(model.text, name)
            if theirs != ours:
                return f"text.{name} is {theirs!r}, the model's is {ours!r}"
        if self.similarity != model.similarity:
            return f"similarity is {self.similarity!r}, the model's is {model.similarity!r}"
        if self.fingerprint != model.fingerprint:
            return f"fingerprint is {self.fingerprint[:12]}, the model's is {model.fingerprint[:12]}: other weights"
        return ""


INDEX = FolderKind(
    "an index",
    STAMP,
    frozenset({"format_version", "generation", "dim", "origin", "shards"}),
    ("shard-*/*", "approximate-*.faiss", "build.json"),
)


class Approximate(Strict):
    """The approximate FAISS index beside the embeddings."""

    factory: str
    parameters: str
    file: str = Field(pattern=r"^approximate-\d+\.faiss$")
    sha256: str


class Stamp(Strict):
    """The `index.json` of an index; what it does not name is not part of the index."""

    format_version: int = FORMAT_VERSION
    generation: int  # counts the changes since the index was built
    count: int
    dim: int
    precision: Precision
    origin: Origin
    shards: dict[Annotated[str, Field(pattern=r"^shard-\d+$")], str]  # in the order of the rows: SHA-256 of shard.json
    approximate: Approximate | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The stamp of an index.

        Raises:
            ValueError: there is none, it is damaged, or it is of another format version.
        """
        path = folder / STAMP
        if not path.is_file():
            raise ValueError(
                f"{folder} is not an index, it has no {STAMP}: make one with `cosup-fast index build`, or name another"
            )
        try:
            data = read_object(path, ["format_version"])
        except ValueError as error:
            raise ValueError(f"{error}: build the index again") from None
        if (version := data["format_version"]) != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {version!r}, this release reads {FORMAT_VERSION}: build the index again"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"{path} is damaged, build the index again: {first_problem(error)}") from None

    def write(self, folder: Path) -> None:
        """Puts the stamp in place: from then on the index is what it says."""
        with replace_file(folder / STAMP) as file:
            file.write(self.model_dump_json(indent=2) + "\n")
