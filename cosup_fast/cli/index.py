"""`cosup-fast index`: build, add, delete, search, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cosup_fast.cli.common import Checkpoint, Device, IndexName, Stale, interruptible, load_model, out, say, say_once
from cosup_fast.terminal import FigureTable, word_table

index_app = typer.Typer(no_args_is_help=True, help="Build, change and search the nonparametric index.")

Corpus = Annotated[str, typer.Option(help="the passages: a JSONL file, a prepared name, or hf:owner/name[:split]")]
Index = Annotated[
    str,
    typer.Argument(help="an index, a run's folder for the one in it, or milvus:URI#COLLECTION", show_default=False),
]
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
    "index build runs/cosup --corpus passages.jsonl --precision bfloat16 | cosup-fast index build runs/cosup --corpus "
    "passages.jsonl --store milvus:http://localhost:19530",
)
def index_build(
    checkpoint: Checkpoint,
    corpus: Corpus = "wiki-leads",
    output: Annotated[Path | None, typer.Option(help="folder to write; default: index/ beside the checkpoint")] = None,
    store: Annotated[
        str | None, typer.Option(help="write into Milvus instead of a folder: milvus:URI#COLLECTION")
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(
            help="also make an approximate index: a FAISS factory string, as IVF4096,PQ64; with --store the type of "
            "Milvus's index, as HNSW, instead of FLAT"
        ),
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
    from cosup_fast.index import INDEX, Options
    from cosup_fast.index.stores import build_index, in_milvus

    if store is not None and output is not None:
        raise ValueError(f"--output {output} names a folder and --store {store} another place: give one of them")
    if store is not None and not in_milvus(store):
        raise ValueError(f"--store {store}: expected milvus:URI; a folder is named by --output")
    name = store or check_replaceable(output or checkpoint / "index", INDEX)
    options = Options(
        shard_size=shard_size,
        batch_tokens=batch_tokens,
        precision=precision,  # type: ignore[arg-type]  # Options says which there are
        restart=restart,
        rank_timeout=rank_timeout,
    )
    with joined_ranks(timeout=rank_timeout), interruptible("nothing was embedded so far"):
        model = load_model(checkpoint, device)
        count = build_index(model, corpus, name, checkpoint, factory=factory, parameters=parameters, options=options)
    say_once(f"index: {name} ({count} passages)")


@index_app.command(
    "add", epilog="Example: cosup-fast index add runs/cosup more-passages.jsonl --index runs/cosup/index"
)
def index_add(
    checkpoint: Checkpoint,
    corpus: Annotated[str, typer.Argument(help="the new passages, as --corpus of build", show_default=False)],
    index: IndexName = None,
    batch_tokens: BatchTokens = None,
    restart: Restart = False,
    rank_timeout: RankTimeout = 600,
    device: Device = "auto",
) -> None:
    """Embed passages with the checkpoint that built the index, and append them."""
    from cosup_fast.distributed import joined_ranks
    from cosup_fast.index import Options
    from cosup_fast.index.stores import load_index

    with joined_ranks(timeout=rank_timeout), interruptible("nothing was embedded so far"):
        model = load_model(checkpoint, device)
        loaded = load_index(index or checkpoint / "index", model, verify=False)
        before = len(loaded)
        options = Options(
            batch_tokens=batch_tokens, precision=loaded.precision, restart=restart, rank_timeout=rank_timeout
        )
        loaded.add(model, corpus, options=options, work=checkpoint)
    say_once(f"added {len(loaded) - before} passages: {loaded.name} ({len(loaded)} passages)")


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
    from cosup_fast.index.stores import open_index

    wanted = list(ids or [])
    if ids_file is not None:
        wanted += _ids(ids_file)
    if not wanted:
        empty = "" if ids_file is None else f", --ids-file {ids_file} holds none"
        raise ValueError(f"name the ids to delete, or a file of them with --ids-file{empty}")
    loaded = open_index(_index(index), verify=False)
    before = len(loaded)
    try:
        loaded.delete(wanted)
    except ValueError as error:
        raise ValueError(f"{error}" if ids_file is None else f"--ids-file {ids_file}: {error}") from None
    say(f"deleted {before - len(loaded)} passages: {loaded.name} ({len(loaded)} passages)")


@index_app.command("search", epilog="Example: cosup-fast index search runs/cosup 'Who wrote Hamlet?' -k 3")
def index_search(
    checkpoint: Checkpoint,
    question: str,
    index: IndexName = None,
    k: Annotated[int, typer.Option("-k", min=1, help="passages to show")] = 5,
    engine: Annotated[str, typer.Option(help="auto, faiss, torch or approximate; Milvus searches itself")] = "auto",
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Show the passages nearest to a question."""
    from cosup_fast.generation import Generator
    from cosup_fast.index.stores import load_index

    model = load_model(checkpoint, device)
    loaded = load_index(
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
    from cosup_fast.index.stores import in_milvus, open_index

    name = _index(index)
    if verify and in_milvus(name):
        raise ValueError(f"--verify compares the files of a folder, and {name} has none: leave it out")
    rows = open_index(name, verify=verify).describe()
    if isinstance(name, Path):
        rows["files"] = "as they were written" if verify else "there, in the sizes written (--verify reads them)"
        for kind in ("building", "adding"):
            unfinished = name.with_name(f".{name.name}.{kind}")
            if unfinished.is_dir():
                rows["unfinished"] = f"{unfinished}: the same command continues it"
    table = word_table("", "", show_header=False)
    for title, value in rows.items():
        table.add_row(title, escape(value))
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


def _index(name: str) -> str | Path:
    from cosup_fast.data.sources import resolve_checkpoint
    from cosup_fast.index.stores import in_milvus, index_exists

    if in_milvus(name):
        return name
    folder = resolve_checkpoint(Path(name))
    within = folder / "index"
    return (within if not index_exists(folder) and index_exists(within) else folder).resolve()
