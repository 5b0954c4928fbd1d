"""Shards of a corpus of any size: read piece by piece, embedded in packs, by one process or many, resumed after a kill.

1. Reading: every rank validates and tokenizes its part of the corpus into shards, before anything is embedded, so that
   a broken line, an id twice or a passage that is too long costs minutes and leaves nothing behind.
2. Embedding: every rank embeds its part of the shards; one that is finished and has its checksums is never done again.
3. Rank 0 adds the approximate index, if wanted, and the stamp, and renames the folder into place.

Until then all of it is kept in a hidden folder beside the index. A shard's rows depend on its passages alone, so the
result does not depend on kills or on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cosup_fast.data.corpus import Corpus
from cosup_fast.data.passages import PassageFile, Passages, hash_ids, repeated
from cosup_fast.data.records import DataError, Passage, to_line
from cosup_fast.distributed.peers import TIMEOUT, Peers
from cosup_fast.files import load_array, locked, read_object, remove_unwritten, replace_file, save_array, sync
from cosup_fast.index.embed import Precision, embed_sequences
from cosup_fast.index.origin import FORMAT_VERSION, Origin
from cosup_fast.index.shards import (
    PASSAGES,
    RECORD,
    ROWS,
    VECTORS,
    check_files,
    write_passages,
    write_record,
)
from cosup_fast.terminal import SafeConsole

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

BUILD, INTAKE, TOKENS, LENGTHS = "build.json", "intake.json", "tokens.npy", "lengths.npy"
_READ_AT_ONCE = 1024


@dataclass(frozen=True)
class Options:
    """How passages are embedded; only `shard_size` and `precision` belong to the result.

    Args:
        shard_size: passages of a shard, which is what a kill costs at most; by default a 256th of the corpus, from 512
            to 65,536.
        batch_tokens: most tokens in one pack; see `embed_passages`.
        precision: of the products.
        restart: throw away an unfinished build of something else.
        progress: show progress bars on stderr.
        rank_timeout: seconds to wait for a rank that reports no progress, where several ranks build together.
    """

    shard_size: int | None = None
    batch_tokens: int | None = None
    precision: Precision = "float32"
    restart: bool = False
    progress: bool = True
    rank_timeout: float = TIMEOUT

    def __post_init__(self):
        if not self.rank_timeout > 0:
            raise ValueError(f"rank_timeout={self.rank_timeout}: give a number of seconds > 0")
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size}: a shard needs at least one passage")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision={self.precision!r}: choose float32 or bfloat16")


def default_shard_size(count: int) -> int:
    """A 256th of a corpus, from 512 to 65,536 passages: minutes of work to lose, and not too many files."""
    return min(65536, max(512, -(-count // 256)))


class Build:
    """Shards being made in a folder, alone or with other ranks.

    Args:
        work: the folder; what an earlier process finished there is reused.
        model: embeds.
        corpus: the passages.
        origin: `Origin.of(model)`.
        known: the rows that have one of these ids already, among those that the shards will be added to.
        options: how.
        context: what else the shards are for; a build of another context is not resumed.

    Raises:
        ValueError: an unfinished build of something else is in `work`, or another process works there.
        PeerError: another rank did not start, died, or made no progress for `options.rank_timeout` seconds.
    """

    def __init__(
        self,
        work: Path,
        model: CoSupervisionModel,
        corpus: Corpus,
        origin: Origin,
        options: Options,
        *,
        known: Callable[[Iterable[str]], dict[str, int]] | None = None,
        context: str = "",
    ):
        self.work = work
        self._peers = Peers.present(timeout=options.rank_timeout)
        self._rank, self._ranks = (0, 1) if self._peers is None else (self._peers.rank, self._peers.size)
        self._model, self._corpus, self._options, self._known = model, corpus, options, known
        size = options.shard_size or default_shard_size(len(corpus))
        self._ranges = {
            f"shard-{i:05d}": (start, min(start + size, len(corpus)))
            for i, start in enumerate(range(0, len(corpus), size))
        }
        self._key = {
            "format_version": FORMAT_VERSION,
            "origin": origin.model_dump(),
            "corpus": {"passages": len(corpus), "sha256": corpus.digest},
            "shard_size": size,
            "precision": options.precision,
            "context": context,
        }
        self._console = SafeConsole(stderr=True)

    def __enter__(self) -> Build:
        with ExitStack() as stack:
            with self.together():
                if self.leads:
                    self.work.mkdir(parents=True, exist_ok=True)
                    try:
                        stack.enter_context(locked(self.work, wait=False))
                    except BlockingIOError:
                        raise ValueError(f"another process is building in {self.work}: wait for it") from None
                    self._take_up()
            if any(key != self._key for key in self._gathered(self._key)):
                raise ValueError("the ranks hold different weights or corpora: give all of them the same")
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @property
    def leads(self) -> bool:
        """Whether this is the process that keeps the folder and shows progress."""
        return self._rank == 0

    @contextmanager
    def together(self, *, silent: bool = False) -> Iterator[None]:
        """Ends when every rank has done its part; a user error in one of them is raised on all.

        Args:
            silent: this part calls what reports no progress, so the process makes it from a thread.
        """
        with ExitStack() as stack:
            if self._peers is not None:
                stack.enter_context(self._peers.together("index"))
                if silent:
                    stack.enter_context(self._peers.progressing())
            yield

    def run(self) -> list[str]:
        """Makes all shards; returns their names in the order of the rows. All ranks call it.

        Raises:
            PeerError: another rank died, or made no progress in time; what is finished stays for the next call.
            DataError: a passage of the corpus is not valid, or its id is there twice; nothing is left behind.
            ValueError: a passage is too long, or an embedding is not finite.
            KeyboardInterrupt: Ctrl-C; it says how much is done.
        """
        names = list(self._ranges)
        finished = self._gathered_from_lead(lambda: [name for name in names if self._is_whole(name, RECORD)])
        taken = self._gathered_from_lead(
            lambda: [name for name in names if name in set(finished) or self._is_whole(name, INTAKE)]
        )
        if finished and self.leads and self._options.progress:
            self._console.print(f"{len(finished)} of {len(names)} shards are there already", highlight=False)
        self._read([name for name in names if name not in set(taken)], finished)
        try:
            self._embed([name for name in names if name not in set(finished)])
        except KeyboardInterrupt:
            done = sum((self.work / name / RECORD).is_file() for name in names)
            raise KeyboardInterrupt(
                f"{done} of {len(names)} shards are finished; the same command continues after them"
            ) from None
        return names

    @property
    def digest(self) -> str:
        """SHA-256 of what the shards are made of: corpus, weights, template, shard size."""
        return hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()

    def discard(self) -> None:
        """Removes everything made so far."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _take_up(self) -> None:
        path = self.work / BUILD
        if not path.is_file() or _begun(path) != self._key:
            if path.is_file() and not self._options.restart:
                raise ValueError(
                    f"{self.work} holds an unfinished build of another corpus, checkpoint, shard_size or precision: "
                    "finish that one, remove the folder, or throw it away with restart=True (--restart)"
                )
            for entry in self.work.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        remove_unwritten(self.work)
        with replace_file(path) as file:
            file.write(json.dumps(self._key, indent=1) + "\n")

    def _gathered(self, value: Any) -> list[Any]:
        """What every rank gave (JSON), by rank."""
        if self._peers is None:
            return [value]
        return [note["value"] for note in self._peers.meet("index", {"value": value})]

    def _gathered_from_lead(self, find: Callable[[], list[str]]) -> list[str]:
        with self.together():
            found = find() if self.leads else []
        return self._gathered(found)[0]

    def _progress(self) -> None:
        if self._peers is not None:
            self._peers.progress()

    def _is_whole(self, name: str, record: str) -> bool:
        self._progress()
        if not (self.work / name / record).is_file():
            return False
        try:
            check_files(self.work / name, record, contents=True)
        except ValueError:
            return False
        return True

    def _read(self, names: Sequence[str], finished: Sequence[str]) -> None:
        mine = names[self._rank :: self._ranks]
        try:
            with self.together(), self._bar("reading", mine) as bar:
                for name in mine:
                    self._take_in(name, bar.advance)
            with self.together():
                if self.leads:
                    self._check_ids()
        except ValueError:
            if self.leads and not finished:
                self.discard()
            raise

    def _take_in(self, name: str, advance: Callable[[int], None]) -> None:
        """Writes a shard's passages and tokens."""
        lines: list[bytes] = []
        ids: list[np.ndarray] = []
        lengths: list[int] = []
        tokens: list[np.ndarray] = []
        start, stop = self._ranges[name]
        for first in range(start, stop, _READ_AT_ONCE):
            passages = list(self._corpus.read(first, min(first + _READ_AT_ONCE, stop)))
            sequences = self._model.template.sequences(passages)
            lines += [to_line(passage).encode() for passage in passages]
            ids.append(hash_ids(passage.id for passage in passages))
            lengths += [len(sequence) for sequence in sequences]
            tokens.append(np.concatenate([np.array(sequence, np.uint32) for sequence in sequences]))
            advance(len(passages))
        new = self.work / f".{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write_passages(new, lines, np.concatenate(ids))
        save_array(new / LENGTHS, np.array(lengths))
        save_array(new / TOKENS, np.concatenate(tokens))
        write_record(new, INTAKE, (PASSAGES, ROWS, LENGTHS, TOKENS))
        shutil.rmtree(self.work / name, ignore_errors=True)  # a damaged one
        new.rename(self.work / name)
        sync(self.work)

    def _check_ids(self) -> None:
        hashes = np.concatenate([load_array(self.work / name / ROWS)["id"] for name in self._ranges])
        passages = Passages([_passages(self.work / name) for name in self._ranges])
        if pair := repeated(passages, hashes):
            first, second = pair
            raise DataError(
                f"{self._corpus.where(second)}: id: expected a new id, found {passages[second].id!r} of "
                f"{self._corpus.where(first)} again"
            )
        if self._known is None:
            return
        known: list[str] = []
        for name in self._ranges:
            self._progress()
            known += self._known(passage.id for passage in _passages(self.work / name))
        if len(known) == len(self._corpus):
            self.discard()
            raise DataError(f"{self._corpus.name}: all of its {len(known)} passages are in the index already")
        if known:
            raise DataError(
                f"{self._corpus.name}: id: expected ids that the index does not have, found {known[0]!r} "
                f"({len(known)} such ids): delete them first"
            )

    def _embed(self, names: Sequence[str]) -> None:
        mine = names[self._rank :: self._ranks]
        with self.together(), self._bar("embedding", mine) as bar:
            for name in mine:
                self._embed_shard(self.work / name, bar.advance)

    def _embed_shard(self, folder: Path, advance: Callable[[int], None]) -> None:
        tokens, lengths = load_array(folder / TOKENS), load_array(folder / LENGTHS).tolist()
        starts = list(accumulate(lengths, initial=0))
        vectors = embed_sequences(
            self._model,
            lengths,
            lambda row: tokens[starts[row] : starts[row + 1]].tolist(),
            batch_tokens=self._options.batch_tokens,
            precision=self._options.precision,
            on_pack=advance,
        ).numpy()
        check_finite(vectors, _passages(folder))
        save_array(folder / VECTORS, vectors)
        write_record(folder, RECORD, (PASSAGES, ROWS, VECTORS))
        for leftover in (INTAKE, TOKENS, LENGTHS):
            (folder / leftover).unlink()

    def _bar(self, title: str, names: Sequence[str]) -> _Bar:
        total = sum(stop - start for start, stop in map(self._ranges.__getitem__, names))
        ranks = f" (rank 0 of {self._ranks})" if self._ranks > 1 else ""
        shown = self._options.progress and self.leads and total > 0
        return _Bar(title + ranks, total, self._console, shown, self._progress)


def check_finite(vectors: np.ndarray, passages: Sequence[Passage]) -> None:
    """Refuses embeddings (M, D) that are not numbers, with the id of the first passage concerned."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"the embedding of passage {passages[int(np.argmin(finite))].id!r} is not finite: the weights are damaged, "
            "or training diverged"
        )


def _begun(path: Path) -> dict[str, Any]:
    """What an unfinished build is of; nothing where that cannot be read."""
    try:
        return read_object(path)
    except ValueError:
        return {}


def _passages(shard: Path) -> PassageFile:
    return PassageFile(shard / PASSAGES, load_array(shard / ROWS)["start"])


class _Bar:
    """A progress bar with a speed; outside of a terminal a line now and then."""

    def __init__(self, title: str, total: int, console: Console, shown: bool, on_advance: Callable[[], None]):
        self._on_advance = on_advance
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not shown, transient=not console.is_terminal
        )
        self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def advance(self, passages: int) -> None:
        self._progress.advance(self._task, passages)
        self._on_advance()


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} passages/s")
