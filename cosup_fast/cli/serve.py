"""`cosup-fast serve`: an OpenAI-compatible API with evidence, and a page that shows answers as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosup_fast.cli.common import (
    Checkpoint,
    Device,
    IndexName,
    Stale,
    Writing,
    err,
    generation_config,
    load_model,
    no_passages,
    say,
)
from cosup_fast.cli.options import with_options

if TYPE_CHECKING:
    from cosup_fast.index import NonparametricIndex
    from cosup_fast.model import CoSupervisionModel


@with_options
def serve(
    checkpoint: Checkpoint,
    index: IndexName = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 picks a free one")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="COSUP_API_KEY", help="clients must send it as a bearer token")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="a name under which clients may reach it, such as a proxy's, besides localhost; '*': any"),
    ] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="an origin whose pages may call the API")] = None,
    system: Annotated[
        list[str] | None, typer.Option(help="another retriever to compare with, as of `evaluate`: bm25, dense:minilm")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="requests answered at once")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="requests that may wait; more are refused with 429")] = 64,
    drain: Annotated[int, typer.Option(min=0, help="seconds that running requests have after SIGTERM")] = 30,
    passage_url: Annotated[
        str | None, typer.Option(help="url of citations, such as https://en.wikipedia.org/wiki/{title}")
    ] = None,
    *,
    writing: Writing,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Serve answers with citations: an OpenAI-compatible API, and a page that shows retrieval as it happens.

    For a run without an index one is built first, from the run's corpus. On Ctrl-C or SIGTERM the answers in progress
    are finished before the server ends.
    """
    import logging
    import os

    # oneDNN compiles a product for each number of rows and keeps the last 1024, which takes much memory where the
    # lengths of prompts vary. A step needs a handful.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and that of torch around it
        os.environ.setdefault(cache, "128")

    from cosup_fast.generation import Generator

    try:
        from cosup_fast.serve.app import create_app
        from cosup_fast.serve.server import listen, serve_on
        from cosup_fast.serve.settings import ServeConfig
        from cosup_fast.serve.systems import offer
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'cosup-fast[serve]'") from None

    config = ServeConfig(
        host=host,
        port=port,
        api_key=api_key,  # type: ignore[arg-type]  # pydantic hides it
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        max_batch=batch,
        max_waiting=waiting,
        drain_seconds=drain,
        passage_url=passage_url,
    )
    generation = generation_config(checkpoint, index=index, **writing.given)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    listening = listen(config)  # before the model is loaded, so that a port in use is reported at once
    model = load_model(checkpoint, device)
    searched = index_of(checkpoint, index, model, allow_stale) if generation.max_retrievals else None
    offered = offer(model, searched, system or ())
    generator = Generator(model, no_passages if searched is None else searched, generation, max_batch=batch)
    app = create_app(generator, searched, offered, generation, config)
    if not config.local:
        guard = "anyone who reaches it" if config.api_key is None else "whoever has the key"
        warning = f"[yellow]--host {host} is reachable from other machines[/]: {guard} may ask"
        err.print(warning + ("; --api-key restricts it" if config.api_key is None else ""), highlight=False)
    passages = "no index" if searched is None else f"{len(searched)} passages"
    models = ", ".join(offered)
    serve_on(app, config, listening, lambda url: say(f"page: {url}/   API: {url}/v1   models: {models} ({passages})"))


def index_of(checkpoint: Path, given: str | None, model: CoSupervisionModel, allow_stale: bool) -> NonparametricIndex:
    """The index to search; for a run that has none yet it is built from the run's corpus."""
    from cosup_fast.config import config_of
    from cosup_fast.index.stores import build_index, index_exists, load_index

    folder = given or checkpoint / "index"
    run = config_of(checkpoint)
    if given is None and not index_exists(folder) and run is not None:
        say(f"no index at {folder}: building it from {run.data.corpus}, once")
        build_index(model, run.data.corpus, folder, checkpoint)
    return load_index(folder, model, allow_stale=allow_stale)
