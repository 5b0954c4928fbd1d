"""A server with a tiny random model that retrieves now and then, in a thread of this process."""

import threading
from contextlib import contextmanager

import httpx2
import openai
import pytest

from cosup_fast.generation import GenerationConfig, Generator
from cosup_fast.index import SequenceIndex
from cosup_fast.serve.app import create_app
from cosup_fast.serve.server import listen, serve_on
from cosup_fast.serve.settings import ServeConfig
from cosup_fast.serve.systems import offer


class Running:
    """A server that listens."""

    def __init__(self, url, app):
        self.url, self.app = url, app
        self.engine = app.state.service.engine
        self.http = httpx2.Client(base_url=url, timeout=60, trust_env=False)

    def client(self, **options):
        http = openai.DefaultHttpxClient(trust_env=False)
        options = {"api_key": "unused", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", http_client=http, **options)


@contextmanager
def _run_server(generator, index, config=None, **more):
    """Serves in a thread until the block ends."""
    config = ServeConfig(port=0, drain_seconds=1, **(config or {}))
    app = create_app(generator, index, offer(generator.model, index, **more), generator.config, config)
    listening, address, servers = threading.Event(), [], []

    def on_listening(url):
        address.append(url)
        listening.set()

    thread = threading.Thread(
        target=serve_on, args=(app, config, listen(config), on_listening, servers.append), daemon=True
    )
    thread.start()
    assert listening.wait(60)
    running = Running(address[0], app)
    try:
        yield running
    finally:
        running.http.close()
        servers[0].should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not running.engine.ready


@pytest.fixture(scope="session")
def serving():
    """A context that serves a generator with its index: the `Running` server."""
    return _run_server


@pytest.fixture(scope="session")
def retriever(make_model, randomize):
    """A random model that writes [NSP] soon and closes what it begins."""
    return randomize(make_model(seed=3), 5)


@pytest.fixture(scope="session")
def index(retriever, passages):
    return SequenceIndex.build(retriever, passages, progress=False)


@pytest.fixture(scope="session")
def generator(retriever, index):
    return Generator(retriever, index, GenerationConfig(max_new_tokens=40, candidates=3))


@pytest.fixture(scope="module")
def server(serving, generator, index):
    with serving(generator, index, {"max_batch": 4, "max_waiting": 4}) as running:
        yield running
