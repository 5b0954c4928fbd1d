"""A Milvus collection as an index keeps its rows in it: connection, schema, stamp, and what goes wrong with them.

Each row is a passage:

    key      VARCHAR       a hash of the id, by which rows are upserted: ids hold what Milvus's filters cannot quote
    row      INT64         its place, by which equal scores are ordered
    id, title, text, topic VARCHAR
    vector   FLOAT_VECTOR  its sequence embedding, (D,) fp32

The stamp is the collection's property `cosup.stamp`. Every call can be repeated without harm, and is while the server
does not answer, for `PATIENCE` seconds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from pydantic import ValidationError

from cosup_fast.data.records import Passage
from cosup_fast.data.strict import Strict
from cosup_fast.errors import CosupError
from cosup_fast.index.embed import Precision
from cosup_fast.index.origin import Origin

PREFIX = "milvus:"
IndexType = Literal["FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "HNSW", "SCANN", "DISKANN", "AUTOINDEX"]

STORE_VERSION = 1
PATIENCE = 60.0
"""Seconds that a server may be away, or need for one answer."""
AT_ONCE = 256
"""Rows that travel in one call: 4 MiB of embeddings of width 4,096."""
MOST_CANDIDATES = 16384
"""That Milvus returns for a query."""
LONGEST = 65535
"""Bytes of a Milvus string."""

_STAMP, _SENT = "cosup.stamp", "cosup.sent"
_BUILDING = "_building"
_TEXTS = ("id", "title", "text", "topic")
_CONNECT_SECONDS = 10.0
# Codes of Milvus; pymilvus gives the first where it cannot connect, too.
_UNAVAILABLE, _NOT_LOADED = 2, 101


class StoreError(CosupError, ValueError):
    """A Milvus server or collection cannot be used; the message names it, the cause and the remedy."""


class Place(NamedTuple):
    """Where a collection is: `milvus:URI#COLLECTION`."""

    uri: str
    collection: str

    @classmethod
    def parse(cls, name: str) -> Self:
        """The place that `milvus:URI[#COLLECTION]` names; the collection is `cosup` unless given.

        Raises:
            ValueError: it has another form.
        """
        uri, _, collection = name.removeprefix(PREFIX).partition("#")
        if not name.startswith(PREFIX) or not (re.match(r"https?://[^/]", uri) or uri.endswith(".db")):
            raise ValueError(
                f"{name!r} is not a Milvus address: give milvus:http://HOST:PORT, milvus:https://HOST:PORT, or "
                "milvus:PATH.db for a file of milvus-lite"
            )
        collection = collection or "cosup"
        if not re.fullmatch(r"[A-Za-z_]\w{0,200}", collection, re.ASCII):
            raise ValueError(
                f"{name!r}: {collection!r} is not a valid collection name: use letters, digits and underscores, and "
                "begin with a letter"
            )
        if collection.endswith(_BUILDING):
            raise ValueError(
                f"{name!r}: {collection!r} is not a valid collection name: {_BUILDING} at its end is kept for "
                "unfinished builds, leave it out"
            )
        return cls(uri, collection)

    @property
    def building(self) -> str:
        """The name of the collection that a build fills until it is whole."""
        return f"{self.collection}{_BUILDING}"

    @property
    def missing(self) -> bool:
        """Whether it is in a file of milvus-lite that does not exist, and that a look at it would make."""
        return not self.uri.startswith("http") and not os.path.exists(self.uri)

    def __str__(self) -> str:
        return f"{PREFIX}{self.uri}#{self.collection}"


class StoreStamp(Strict):
    """What a collection holds, and what made it."""

    version: int = STORE_VERSION
    generation: int = 0  # counts the changes since the index was built
    rows: int  # the next row; rows that were deleted leave gaps
    dim: int
    precision: Precision
    origin: Origin
    index: IndexType
    parameters: dict[str, Any]  # of the search
    state: Literal["whole", "building", "adding"]
    source: str  # what was written last, or is being written: a digest of corpus, shards and origin


def _pymilvus() -> Any:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # milvus-lite complains of pymilvus's pings
    try:
        import pymilvus
    except ImportError as error:
        raise ImportError(f"an index in Milvus needs pymilvus: pip install 'cosup-fast[milvus]' ({error})") from None
    for noisy in ("pymilvus", "grpc._server"):  # what they would print is raised
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    return pymilvus


class Collection:
    """A collection that may exist or not.

    Args:
        place: where.

    Raises:
        ImportError: pymilvus is not installed.
        StoreError: nothing answers there, or something other than Milvus; from every method, that the server stops
            answering or refuses the call.
    """

    def __init__(self, place: Place):
        self.place = place
        self._pymilvus = _pymilvus()
        self.client: Any = None
        try:
            self.call("get_server_version", collection=False, patience=min(PATIENCE, _CONNECT_SECONDS))
        except StoreError as error:
            raise StoreError(
                f"no Milvus answers at {place.uri}: check the address, and that it is that of a Milvus server ({error})"
            ) from error

    def named(self, collection: str) -> Collection:
        """Another collection there, over a connection of its own."""
        other = copy.copy(self)
        other.client = None
        other.place = self.place._replace(collection=collection)
        return other

    def close(self) -> None:
        """Ends the connection; a later call makes a new one."""
        client, self.client = self.client, None
        if client is not None:
            client.close()

    def exists(self) -> bool:
        """Whether there is such a collection."""
        return self.call("has_collection")

    def create(self, stamp: StoreStamp) -> None:
        """Makes it, empty and stamped."""
        kinds = self._pymilvus.DataType
        schema = self._pymilvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        for name, (kind, options) in _fields(stamp.dim).items():
            schema.add_field(name, kinds[kind], **options)
        indexes = self._pymilvus.MilvusClient.prepare_index_params()
        indexes.add_index("vector", index_type=stamp.index, metric_type="IP")
        indexes.add_index("row", index_type="INVERTED")
        self.call(
            "create_collection",
            schema=schema,
            index_params=indexes,
            consistency_level="Strong",
            properties={_STAMP: stamp.model_dump_json()},
        )

    def drop(self) -> None:
        """Removes it."""
        self.call("drop_collection")

    def take_name(self, collection: str) -> None:
        """Gives it the name of another index, which is removed."""
        with closing(self.named(collection)) as other:
            if other.exists():
                other.check_ours()
                other.drop()
            try:
                self.call("rename_collection", collection)
            except StoreError:
                # Where the answer to a rename was lost, the next try is refused, because it is done already.
                if self.exists() or not other.exists():
                    raise
            self.place = other.place

    def check_ours(self) -> None:
        """Refuses a collection that no index was ever kept in.

        Raises:
            StoreError: it has no stamp.
        """
        self._described()

    def is_of(self, *stamps: StoreStamp) -> bool:
        """Whether its stamp is one of these, and its fields are as the stamp says.

        Raises:
            StoreError: it has no stamp.
        """
        described = self._described()
        try:
            return self._read_stamp(*described) in stamps
        except StoreError:
            return False

    def stamp(self) -> StoreStamp:
        """Its stamp, after a comparison of the schema with it.

        Raises:
            StoreError: it has none or a damaged one, is of another version, or its fields were changed.
        """
        return self._read_stamp(*self._described())

    def _described(self) -> tuple[dict[str, Any], str]:
        found = self.call("describe_collection")
        text = found["properties"].get(_STAMP)
        if text is None:
            raise StoreError(f"{self.place} is a collection of something else: name another one, as {self._other}")
        return found, text

    def _read_stamp(self, found: dict[str, Any], text: str) -> StoreStamp:
        try:
            if (version := json.loads(text)["version"]) != STORE_VERSION:
                raise StoreError(
                    f"{self.place} has version {version!r}, this release reads {STORE_VERSION}: build the index again"
                )
            stamp = StoreStamp.model_validate_json(text)
        except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
            raise StoreError(f"the stamp of {self.place} is damaged: build the index again ({error})") from None
        there = {field["name"]: field for field in found["fields"]}
        expected = _fields(stamp.dim)
        if lost := [name for name in expected if name not in there]:
            raise StoreError(f"{self.place} was changed, it has no field {lost[0]!r}: build the index again")
        for name, (kind, options) in expected.items():
            is_kind, dim = there[name]["type"].name, there[name]["params"].get("dim")
            if is_kind != kind or (dim is not None and int(dim) != options["dim"]):
                width = "" if dim is None else f" of width {dim}"
                raise StoreError(
                    f"{self.place} was changed, its field {name!r} is {is_kind}{width}, the stamp says {kind}"
                    + (f" of width {stamp.dim}" if dim is not None else "")
                    + ": build the index again"
                )
        return stamp

    def write_stamp(self, stamp: StoreStamp) -> None:
        """Replaces its stamp."""
        self.call("alter_collection_properties", properties={_STAMP: stamp.model_dump_json()})

    def sent(self) -> int:
        """Shards of the source that are in it whole."""
        return int(self.call("describe_collection")["properties"].get(_SENT) or 0)

    def write_sent(self, shards: int) -> None:
        """Records `sent`."""
        self.call("alter_collection_properties", properties={_SENT: str(shards)})

    def load(self) -> None:
        """Has the server hold it ready for searches."""
        self.call("load_collection")

    def upsert(self, passages: Sequence[Passage], vectors: np.ndarray, start: int) -> None:
        """Writes passages with their embeddings (m, D) as the rows from `start` on, over those with the same ids."""
        for first in range(0, len(passages), AT_ONCE):
            part = passages[first : first + AT_ONCE]
            rows = [
                {"key": key_of(passage.id), "row": start + first + i, "vector": vectors[first + i]}
                | {name: getattr(passage, name) for name in _TEXTS}
                for i, passage in enumerate(part)
            ]
            self.call("upsert", rows)

    def delete(self, ids: Iterable[str]) -> None:
        """Removes the rows of ids."""
        keys = [key_of(name) for name in ids]
        for first in range(0, len(keys), 4 * AT_ONCE):
            self.call("delete", ids=keys[first : first + 4 * AT_ONCE])

    def delete_from(self, row: int) -> None:
        """Removes the rows from `row` on."""
        self.call("delete", filter=f"row >= {row}")

    def count(self, rows: int) -> int:
        """How many of the rows below `rows` are there."""
        return int(self.call("query", filter=f"row < {rows}", output_fields=["count(*)"])[0]["count(*)"])

    def present(self, rows: int) -> np.ndarray:
        """The rows below `rows` that are there, (M,) int64."""
        found: list[int] = []
        for start in range(0, rows, MOST_CANDIDATES):
            wanted = f"row >= {start} and row < {min(rows, start + MOST_CANDIDATES)}"
            found += sorted(one["row"] for one in self.call("query", filter=wanted, output_fields=["row"]))
        return np.array(found, np.int64)

    def rows(self, ids: Iterable[str], below: int) -> dict[str, int]:
        """The row of each id that is there, of those `below` a row."""
        return {one["id"]: one["row"] for one in self._of_keys(ids, ["id", "row"], below)}

    def passages(self, ids: Iterable[str], below: int) -> list[Passage]:
        """The passages of the ids that are there, of the rows `below` one, in no order."""
        return [passage_of(one) for one in self._of_keys(ids, ["row", *_TEXTS], below)]

    def fetch(self, rows: Sequence[int], *, vectors: bool) -> list[dict[str, Any]]:
        """Passages, or with `vectors` embeddings, of rows in their order.

        Raises:
            StoreError: one is not there.
        """
        found: dict[int, dict[str, Any]] = {}
        for first in range(0, len(rows), AT_ONCE):
            wanted = f"row in {[int(row) for row in rows[first : first + AT_ONCE]]}"
            fields = ["row", "vector"] if vectors else ["row", *_TEXTS]
            found |= {one["row"]: one for one in self.call("query", filter=wanted, output_fields=fields)}
        if lost := [row for row in rows if row not in found]:
            raise StoreError(f"row {lost[0]} of {self.place} is gone, another process deleted it: open the index again")
        return [found[row] for row in rows]

    def search(
        self, queries: np.ndarray, count: int, parameters: dict[str, Any], *, below: int | None = None
    ) -> list[list[dict[str, Any]]]:
        """The entities, embeddings included, of the best `count` rows for each query (N, D), of those `below` a row."""
        options: dict[str, Any] = {"search_params": {"metric_type": "IP", "params": parameters}}
        if below is not None:
            options["filter"] = f"row < {below}"
        fields = ["row", "vector", *_TEXTS]
        found = self.call("search", data=list(queries), limit=count, output_fields=fields, **options)
        return [[hit["entity"] for hit in hits] for hits in found]

    @property
    def _other(self) -> str:
        return str(self.place._replace(collection=f"{self.place.collection}_2"))

    def _of_keys(self, ids: Iterable[str], fields: list[str], below: int) -> Iterator[dict[str, Any]]:
        keys = list(dict.fromkeys(map(key_of, ids)))
        for first in range(0, len(keys), AT_ONCE):
            found = self.call("query", ids=keys[first : first + AT_ONCE], output_fields=fields)
            yield from (one for one in found if one["row"] < below)

    def call(
        self, method: str, *arguments: Any, collection: bool = True, patience: float | None = None, **options: Any
    ) -> Any:
        """Calls the client, again and again where the server does not answer."""
        import grpc

        patience = PATIENCE if patience is None else patience
        deadline, pause = time.monotonic() + patience, 0.1
        names = (self.place.collection,) if collection else ()
        while True:
            try:
                if self.client is None:
                    self.client = self._connect()
                left = max(1.0, deadline - time.monotonic())
                return getattr(self.client, method)(*names, *arguments, timeout=left, **options)
            except (self._pymilvus.MilvusException, grpc.RpcError) as error:
                reason = " ".join(str(getattr(error, "message", "") or error).split())
                if getattr(error, "code", None) == _NOT_LOADED and method != "load_collection":
                    self.load()  # the server was started again
                elif _is_away(error):
                    self.close()
                else:
                    raise StoreError(f"{self.place}: {method} was refused: {reason}") from error
                if time.monotonic() + pause > deadline:
                    raise StoreError(
                        f"{self.place} has not answered for {patience:.0f} s: check that the server runs and can be "
                        f"reached; what was being built or added resumes with the same command ({reason})"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _connect(self) -> Any:
        uri = self.place.uri
        if not uri.startswith("http"):
            os.makedirs(os.path.dirname(os.path.abspath(uri)), exist_ok=True)
        token = os.environ.get("COSUP_MILVUS_TOKEN", "")
        return self._pymilvus.MilvusClient(uri, token=token, timeout=min(PATIENCE, _CONNECT_SECONDS))


def key_of(name: str) -> str:
    """The key of the passage with an id: 128 bits of a hash, in hex."""
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def passage_of(entity: dict[str, Any]) -> Passage:
    """The passage in a row."""
    return Passage(**{name: entity[name] for name in _TEXTS})


def check_index_type(name: str) -> IndexType:
    """A Milvus index type.

    Raises:
        ValueError: Milvus has no such type.
    """
    for known in get_args(IndexType):
        if name == known:
            return known
    raise ValueError(f"factory={name!r}: in Milvus choose one of {', '.join(get_args(IndexType))}")


def _is_away(error: Any) -> bool:
    """Whether an error says that the server does not answer, or not now, rather than that it refuses the call."""
    import grpc

    waiting = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    if isinstance(error, grpc.RpcError):
        return error.code() in waiting  # type: ignore[attr-defined]  # a call's error has it
    return error.code in (_UNAVAILABLE, *waiting) or error.retriable


def _fields(dim: int) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "key": ("VARCHAR", {"is_primary": True, "max_length": 32}),
        "row": ("INT64", {}),
        **{name: ("VARCHAR", {"max_length": LONGEST}) for name in _TEXTS},
        "vector": ("FLOAT_VECTOR", {"dim": dim}),
    }
