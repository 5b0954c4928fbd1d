"""`cosup-fast index`: build, add, delete, search, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from cosup_fast.cli.common import Checkpoint, Device, Stale, interruptible, load_model, out, say, say_once
from cosup_fast.terminal import FigureTable, word_table

index_app = typer.Typer(no_args_is_help=True, help="Build, change and search the nonparametric index.")

Corpus = Annotated[str, typer.Option(help="the passages: a JSONL file, a prepared name, or hf:owner/name[:split]")]
Place = Annotated[Path | None, typer.Option(help="the index; default: index/ beside the checkpoint")]
Index = Annotated[Path, typer.Argument(help="an index, or a run's folder for the one in it", show_default=False)]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="most tokens of a batch; default: 4096 on a CPU, 16384 on a GPU")
]
RankTimeout = Annotated[
    float, typer.Option(min=1, help="under torchrun: seconds to wait for a rank that reports no progress")
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away an unfinished build of something else.")]


@index_app.command(
    "build",
    epilog="Examples: cosup-fast index build runs/cosup --corpus wiki-leads | cosup-fast index build runs/cosup "
    "--corpus passages.jsonl --factory IVF4096,PQ64 --parameters nprobe=64 | torchrun --nproc-per-node 8 -m cosup_fast "
    "index build runs/cosup --corpus passages.jsonl --precision bfloat16",
)
def index_build(
    checkpoint: Checkpoint,
    corpus: Corpus = "wiki-leads",
    output: Annotated[Path | None, typer.Option(help="folder to write; default: index/ beside the checkpoint")] = None,
    factory: Annotated[
        str | None, typer.Option(help="also make an approximate index: a FAISS factory string, as IVF4096,PQ64")
    ] = None,
    parameters: Annotated[str, typer.Option(help="parameters of the approximate search, such as nprobe=64")] = "",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16 products")] = "float32",
    batch_tokens: BatchTokens = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="passages of a shard, which is what a kill costs; default: by the corpus")
    ] = None,
    restart: Restart = False,
    rank_timeout: RankTimeout = 600,
    device: Device = "auto",
) -> None:
    """Embed every passage with Embseq and write the index.

    The corpus is checked as a whole first and may be larger than memory. A build that was stopped is continued by the
    same command; torchrun shares it among processes.
    """
    from cosup_fast.distributed import joined_ranks
    from cosup_fast.files import check_replaceable
    from cosup_fast.index import INDEX, Options, SequenceIndex

    output = check_replaceable(output or checkpoint / "index", INDEX)
    options = Options(
        shard_size=shard_size,
        batch_tokens=batch_tokens,
        precision=precision,  # type: ignore[arg-type]  # Options says which there are
        restart=restart,
        rank_timeout=rank_timeout,
    )
    with joined_ranks(timeout=rank_timeout), interruptible("nothing was embedded so far"):
        model = load_model(checkpoint, device)
        index = SequenceIndex.build(model, corpus, output, factory=factory, parameters=parameters, options=options)
    say_once(f"index: {output} ({len(index)} passages)")


@index_app.command(
    "add", epilog="Example: cosup-fast index add runs/cosup more-passages.jsonl --index runs/cosup/index"
)
def index_add(
    checkpoint: Checkpoint,
    corpus: Annotated[str, typer.Argument(help="the new passages, as --corpus of build", show_default=False)],
    index: Place = None,
    batch_tokens: BatchTokens = None,
    restart: Restart = False,
    rank_timeout: RankTimeout = 600,
    device: Device = "auto",
) -> None:
    """Embed passages with the checkpoint that built the index, and append them."""
    from cosup_fast.distributed import joined_ranks
    from cosup_fast.index import Options, SequenceIndex

    with joined_ranks(timeout=rank_timeout), interruptible("nothing was embedded so far"):
        model = load_model(checkpoint, device)
        loaded = SequenceIndex.load(index or checkpoint / "index", model, verify=False)
        before = len(loaded)
        options = Options(
            batch_tokens=batch_tokens, precision=loaded.precision, restart=restart, rank_timeout=rank_timeout
        )
        loaded.add(model, corpus, options=options)
    say_once(f"added {len(loaded) - before} passages: {loaded.folder} ({len(loaded)} passages)")


@index_app.command(
    "delete",
    epilog="Examples: cosup-fast index delete runs/cosup wiki:Paris wiki:Rome | cosup-fast index delete "
    "runs/cosup/index --ids-file gone.txt",
)
def index_delete(
    index: Index,
    ids: Annotated[list[str] | None, typer.Argument(help="ids of passages", show_default=False)] = None,
    ids_file: Annotated[Path | None, typer.Option(help="a file with an id a line")] = None,
) -> None:
    """Remove passages by id; all of them or, if one is not there, none."""
    from cosup_fast.index import SequenceIndex

    wanted = list(ids or [])
    if ids_file is not None:
        wanted += _ids(ids_file)
    if not wanted:
        empty = "" if ids_file is None else f", --ids-file {ids_file} holds none"
        raise ValueError(f"name the ids to delete, or a file of them with --ids-file{empty}")
    loaded = SequenceIndex.open(_index(index), verify=False)
    before = len(loaded)
    try:
        loaded.delete(wanted)
    except ValueError as error:
        raise ValueError(f"{error}" if ids_file is None else f"--ids-file {ids_file}: {error}") from None
    say(f"deleted {before - len(loaded)} passages: {loaded.folder} ({len(loaded)} passages)")


@index_app.command("search", epilog="Example: cosup-fast index search runs/cosup 'Who wrote Hamlet?' -k 3")
def index_search(
    checkpoint: Checkpoint,
    question: str,
    index: Place = None,
    k: Annotated[int, typer.Option("-k", min=1, help="passages to show")] = 5,
    engine: Annotated[str, typer.Option(help="auto, faiss, torch or approximate")] = "auto",
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Show the passages nearest to a question."""
    from cosup_fast.generation import Generator
    from cosup_fast.index import SequenceIndex

    model = load_model(checkpoint, device)
    loaded = SequenceIndex.load(
        index or checkpoint / "index",
        model,
        allow_stale=allow_stale,
        engine=engine,  # type: ignore[arg-type]  # it says which there are
    )
    table = FigureTable("id", "title", "text", "score", names=3)
    for passage, score in loaded.retrieve(Generator(model, loaded).query(question), k):
        table.add_row(passage.id, passage.title, passage.text[:160], f"{score:.3f}")
    out.print(table)


@index_app.command("info", epilog="Example: cosup-fast index info runs/cosup --verify")
def index_info(
    index: Index,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its checksum.")] = False,
) -> None:
    """Show what an index holds, what made it, and whether it is whole."""
    from cosup_fast.index import SequenceIndex
    from cosup_fast.index.origin import Stamp

    folder = _index(index)
    loaded = SequenceIndex.open(folder, verify=verify)
    stamp = Stamp.read(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    table = word_table("", "", show_header=False)
    rows = {
        "folder": str(folder),
        "passages": f"{len(loaded):,}",
        "width": str(loaded.dim),
        "shards": f"{len(stamp.shards)}, {decimal(size)} in all",
        "changes since it was built": str(stamp.generation),
        "products": stamp.precision,
        "approximate": f"{stamp.approximate.factory} {stamp.approximate.parameters}" if stamp.approximate else "none",
        "checkpoint": stamp.origin.fingerprint,
        "similarity": stamp.origin.similarity,
        "passage template": stamp.origin.text.passage,
        "longest passage": f"{stamp.origin.text.max_passage_tokens} tokens",
        "files": "as they were written" if verify else "there, in the sizes written (--verify reads them)",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    for kind in ("building", "adding"):
        unfinished = folder.with_name(f".{folder.name}.{kind}")
        if unfinished.is_dir():
            table.add_row("unfinished", escape(f"{unfinished}: the same command continues it"))
    out.print(table)


def _ids(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"--ids-file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--ids-file {path}: expected UTF-8, found byte 0x{error.object[error.start]:02x}") from None
    return [line for line in text.split("\n") if line.strip()]


def _index(folder: Path) -> Path:
    from cosup_fast.index import STAMP

    within = folder / "index"
    return (within if not (folder / STAMP).is_file() and (within / STAMP).is_file() else folder).resolve()
