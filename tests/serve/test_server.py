"""One engine behind many clients: batches, cancellation, the queue, keys, the end; and the other endpoints."""

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
import torch

from cosup_fast.cli.app import demo
from cosup_fast.generation import Decoder, GenerationConfig, Request
from cosup_fast.index import embed_passages
from cosup_fast.serve.settings import ServeConfig

CHAT = "/v1/chat/completions"


def body(question="Who?", **changes):
    return {"model": "co-supervised", "messages": [{"role": "user", "content": question}]} | changes


def test_clients_at_once_have_the_offline_answers(server, generator):
    questions = [f"Question {n}?" * (1 + n % 3) for n in range(8)]
    expected = [answer.text for answer in generator.generate_all([Request(q) for q in questions])]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda q: server.http.post(CHAT, json=body(q)).json(), questions))
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == expected


def test_a_seed_samples_the_offline_answer(server, generator):
    reply = server.http.post(CHAT, json=body(temperature=0.9, top_p=0.8, seed=7, stop=["e"], max_tokens=20)).json()
    config = GenerationConfig(temperature=0.9, top_p=0.8, seed=7, stop=["e"], max_new_tokens=20, candidates=3)
    expected = generator.generate_all([Request("Who?", config=config)])[0].text
    assert reply["choices"][0]["message"]["content"] == expected


def test_models(server):
    with server.client() as client:
        assert [model.id for model in client.models.list()] == ["co-supervised", "closed-book"]
        assert client.models.retrieve("closed-book").owned_by == "cosup-fast"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("x")


def test_closed_book_retrieves_nothing_and_says_so(server):
    reply = server.http.post(CHAT, json=body(model="closed-book")).json()
    assert reply["search_results"] == []
    assert reply["choices"][0]["message"]["annotations"] == []


def test_another_retriever_is_another_model(serving, generator, index, monkeypatch):
    with serving(generator, index, others=["bm25"]) as server:
        # The corpus was read before clients were let in: the first of them would have made all others wait for it.
        monkeypatch.delattr("bm25s.BM25.index")
        ask = body("What is the capital of Italy?", model="bm25", ret_first=True, candidates=2)
        reply = server.http.post(CHAT, json=ask).json()
        assert reply["search_results"][0]["id"] == "rome"


def test_search_finds_what_gen_would_find(server, generator, index):
    reply = server.http.post("/v1/search", json={"query": "Who?", "k": 4}).json()
    expected = index.retrieve(generator.query("Who?"), 4)
    assert [(one["id"], one["score"]) for one in reply["search_results"]] == [(p.id, s) for p, s in expected]


def test_embeddings_are_those_of_the_index(server, retriever, passages):
    texts = [{"title": p.title, "text": p.text} for p in passages]
    data = server.http.post("/v1/embeddings", json={"model": "co-supervised", "input": texts}).json()["data"]
    expected = embed_passages(retriever, passages)
    torch.testing.assert_close(torch.tensor([one["embedding"] for one in data]), expected)
    with server.client() as client:  # which asks for base64
        (one,) = client.embeddings.create(model="co-supervised", input="The Nile.").data
        assert np.isfinite(one.embedding).all()
        assert len(one.embedding) == retriever.width
        with pytest.raises(openai.BadRequestError, match="max_passage_tokens"):
            client.embeddings.create(model="co-supervised", input="x " * 4000)


def test_a_citation_links_to_its_passage(server, passages):
    for passage in passages:
        found = server.http.post("/v1/search", json={"query": passage.title or "x", "k": 11}).json()["search_results"]
        url = next(one["url"] for one in found if one["id"] == passage.id)
        assert server.http.get(url).json()["text"] == passage.text
    assert server.http.get("/passages/none").status_code == 404


def test_a_passage_is_looked_up_where_the_index_may_be_used(serving, generator, index, monkeypatch):
    class Asked(dict):
        def get(self, name, default=None):
            asked.append(threading.current_thread().name)
            return super().get(name, default)

    asked: list[str] = []
    monkeypatch.setattr(index, "by_id", Asked(index.by_id))
    with serving(generator, index) as server:
        assert server.http.get("/passages/paris").json()["id"] == "paris"
        assert server.http.get("/passages/none").status_code == 404
    assert asked == ["cosup-fast engine"] * 2


@pytest.fixture
def slow(monkeypatch):
    """Steps that take long enough for a client to leave before its answer ends."""
    step = Decoder.step

    def slowly(decoder):
        time.sleep(0.05)
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", slowly)


def cancelled(server):
    return server.engine.metrics.registry.get_sample_value("cosup_answers_total", {"stop_reason": "cancelled"}) or 0


def test_closed_connections_free_their_places(server, slow, eventually):
    before = cancelled(server)
    clients = [server.client() for _ in range(4)]
    streams = [client.chat.completions.create(**body(max_tokens=400, stream=True)) for client in clients]
    for stream in streams:
        next(iter(stream))
    for client, stream in zip(clients, streams, strict=True):
        stream.close()
        client.close()
    eventually(lambda: server.engine.open == 0)
    assert cancelled(server) == before + 4
    assert server.engine.decoder.free == 4


def test_a_client_that_waits_for_a_whole_answer_may_leave_too(server, slow, eventually):
    before = cancelled(server)
    with pytest.raises(httpx2.TimeoutException):
        server.http.post(CHAT, json=body(max_tokens=450, max_retrievals=0), timeout=0.3)
    eventually(lambda: server.engine.open == 0)
    assert cancelled(server) == before + 1


def test_a_full_queue_answers_429(serving, generator, index):
    with serving(generator, index, {"max_batch": 1, "max_waiting": 1}) as server, ThreadPoolExecutor(12) as pool:
        ask = body(max_tokens=60, max_retrievals=0)
        replies = list(pool.map(lambda n: server.http.post(CHAT, json=ask), range(12)))
        statuses = {reply.status_code for reply in replies}
        assert statuses == {200, 429}
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        count = sum(reply.status_code == 429 for reply in replies)
        assert f"cosup_requests_refused_total {count:.1f}" in server.http.get("/metrics").text


def test_a_key_is_asked_for(serving, generator, index):
    with serving(generator, index, {"api_key": " secret "}) as server:
        assert server.http.get("/").status_code == 200
        assert server.http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            for path in ("/v1/models", "/metrics", "/passages/paris"):
                reply = server.http.get(path, headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["type"] == "authentication_error"
                assert "secret" not in reply.text
        with server.client(api_key="secret") as client:
            assert client.models.list().data


def test_a_body_may_be_too_large(serving, generator, index):
    with serving(generator, index, {"max_body_bytes": 500}) as server:
        big = body("x" * 500)
        assert server.http.post(CHAT, json=big).status_code == 413

        def chunks():
            yield from (b" " * 100 for _ in range(6))

        reply = server.http.post(CHAT, content=chunks(), headers={"Content-Type": "application/json"})
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "body_too_large"


def test_other_origins_are_let_in_only_when_named(server, serving, generator, index):
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in server.http.options(CHAT, headers=headers).headers
    with serving(generator, index, {"cors_origins": ("https://example.org",), "api_key": "k"}) as open_server:
        reply = open_server.http.options(CHAT, headers=headers)
        assert reply.headers["Access-Control-Allow-Origin"] == "https://example.org"
        sent = {"Origin": "https://example.org", "Authorization": "Bearer k"}
        assert open_server.http.post(CHAT, json=body(max_tokens=1), headers=sent).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil", "[::1", "]"]
)
def test_a_name_that_another_site_gave_this_machine_is_refused(server, host):
    """DNS rebinding: the browser takes the other site's page for the server's own."""
    for path in ("/", "/v1/models", "/health"):
        reply = server.http.get(path, headers={"Host": host, "Origin": f"http://{host}"})
        assert reply.status_code == 403
        assert reply.json()["error"] | {"message": ""} == {
            "message": "", "type": "permission_error", "param": None, "code": "host_not_allowed"
        }  # fmt: skip
    assert "--allowed-host" in reply.json()["error"]["message"]


def test_a_server_answers_to_addresses_localhost_and_the_names_it_was_given(server, serving, generator, index):
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", "10.0.0.7", "localhost."):
        assert server.http.get("/health", headers={"Host": host}).status_code == 200
    with serving(generator, index, {"allowed_hosts": ("models.example",)}) as named:
        assert named.http.get("/health", headers={"Host": "Models.Example:443"}).status_code == 200
        assert named.http.get("/health", headers={"Host": "other.example"}).status_code == 403
    for open_to_all in (ServeConfig(allowed_hosts=("*",)), ServeConfig(host="0.0.0.0")):
        assert open_to_all.knows("any.example")
    assert not ServeConfig(host="0.0.0.0", allowed_hosts=("models.example",)).knows("any.example")
    for wrong in ("http://x", "x:80", "", "*.x"):
        with pytest.raises(ValueError, match="allowed_hosts"):
            ServeConfig(allowed_hosts=(wrong,))


def test_pages_of_other_origins_cannot_make_it_write(server):
    """A form needs nobody's permission to send its text, so the server has to look where it comes from."""
    for origin in ("https://evil.example", "null", server.url.replace("127.0.0.1", "localhost")):
        reply = server.http.post(CHAT, json=body(max_tokens=1), headers={"Origin": origin})
        assert reply.status_code == 403
        assert reply.json()["error"]["code"] == "origin_not_allowed"
    assert server.http.post(CHAT, json=body(max_tokens=1), headers={"Origin": server.url}).status_code == 200


def test_metrics_count(server):
    server.http.post(CHAT, json=body(ret_first=True))
    text = server.http.get("/metrics").text
    for name in ("generated_tokens_total", "retrievals_total", "answer_seconds_count", "first_token_seconds_count"):
        (value,) = re.findall(rf"^cosup_{name} (\S+)$", text, re.M)
        assert float(value) > 0
    assert 'cosup_http_responses_total{path="/v1/chat/completions",status="200"}' in text
    assert "cosup_requests_running 0.0" in text


def test_the_first_token_is_the_first_that_is_written(server):
    """Not the retrieval before it."""

    def total():
        return server.engine.metrics.registry.get_sample_value("cosup_first_token_seconds_sum")

    before = total()
    timeline = server.http.post(CHAT, json=body(ret_first=True)).json()["timeline"]
    written = next(one["start_ms"] for one in timeline if one["phase"] == "write")
    assert total() - before == pytest.approx(written / 1000, abs=1e-5)


def test_the_timeline_is_in_order_and_whole(server):
    timeline = server.http.post(CHAT, json=body(ret_first=True)).json()["timeline"]
    assert [one["phase"] for one in timeline[:3]] == ["wait", "read", "retrieve"]
    assert {"write"} <= {one["phase"] for one in timeline}
    assert timeline[0]["start_ms"] == 0
    for one, following in pairwise(timeline):
        assert one["end_ms"] == following["start_ms"] >= one["start_ms"]


@pytest.fixture(scope="module")
def run_folder(retriever, index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    retriever.save(folder / "model")
    index.save(folder / "model" / "index")
    return folder / "model"


def started(*arguments):
    """The command in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cosup_fast", "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    line = next((line for line in process.stdout if "API: " in line), "")
    found = re.search(r"API: (\S+)/v1", line)
    assert found, line + process.stderr.read()
    return process, found[1]


def test_sigterm_lets_running_answers_end(run_folder):
    process, url = started(run_folder, "--drain", 30)
    ask = body(max_tokens=150, max_retrievals=0, stream=True)
    try:
        with httpx2.Client(base_url=url, trust_env=False) as http, http.stream("POST", CHAT, json=ask) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert '"finish_reason":"' in "".join(rest)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_is_served_with_an_index_of_its_corpus(cosup, llama_folder, data_folder, tmp_path):
    """As `make serve` opens what the demo trained."""
    run, corpus = tmp_path / "run", data_folder / "passages.jsonl"
    train = [f"output={run}", f"model.gen={llama_folder}", f"data.corpus={corpus}", "data.dev=[]"]
    train += [f"data.train=[{data_folder / 'examples.jsonl'}]", "training.steps=1", "training.batch_size=2"]
    train += ["generation.ret_first=true", "generation.max_new_tokens=4"]
    status, _, err = cosup("train", *train)
    assert status == 0, err
    process, url = started(run)
    try:
        with httpx2.Client(base_url=url, trust_env=False, timeout=60) as http:
            reply = http.post(CHAT, json=body()).json()
        assert {one["retrieval"] for one in reply["search_results"]} == {0}  # the run's own ret_first
        assert (run / "index" / "index.json").is_file()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_serve_serves_what_the_demo_writes():
    root = Path(__file__).resolve().parents[2]
    made = subprocess.run(["make", "-n", "serve"], cwd=root, capture_output=True, text=True, check=True).stdout
    commands = [line for line in made.splitlines() if "/cosup-fast " in line]
    assert [command.split("/cosup-fast ")[1] for command in commands] == ["demo", "serve runs/demo/run"]
    assert inspect.signature(demo).parameters["output"].default == Path("runs/demo")


def test_the_command_refuses_what_it_cannot_serve(run_folder, cosup, tmp_path):
    status, _, err = cosup("serve", run_folder, "--index", tmp_path / "none", "--port", 0)
    assert status == 1
    assert "none" in err
    status, _, err = cosup("serve", run_folder, "--system", "gold", "--port", 0)
    assert status == 1
    assert "--system gold" in err
    status, _, err = cosup("serve", run_folder, "--host", "192.0.2.1")
    assert status == 1
    assert "cannot listen on --host 192.0.2.1" in err
    status, _, err = cosup("serve", run_folder, "--passage-url", "ftp://x/{id}")
    assert status == 1
    assert "passage_url" in err
