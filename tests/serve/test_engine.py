"""How requests share the decoder, counted in forwards and wake-ups, which are the same on any machine."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cosup_fast.generation import GenerationConfig, Generator, Listener, Request
from cosup_fast.generation.cache import SlotCache
from cosup_fast.generation.runner import Runner
from cosup_fast.generation.task import Task
from cosup_fast.index import SequenceIndex
from cosup_fast.serve.engine import Job

CHAT, PLACES = "/v1/chat/completions", 16


def body(number, **changes):
    question = {"role": "user", "content": f"Question {number}?"}
    return {"model": "co-supervised", "messages": [question]} | changes


class Forwards(list):
    """The chunks of each forward so far, and a gate that lets the engine run a number of them."""

    def __init__(self, eventually):
        self.eventually = eventually
        self.waiting = -1  # how many had run when the engine came to the gate
        self._allowed = None

    def close(self):
        self._allowed = threading.Semaphore(0)

    def allow(self, count):
        """Lets `count` more run, and waits until the engine wants another one."""
        expected = len(self) + count
        self._allowed.release(count)
        self.eventually(lambda: self.waiting == expected)

    def open(self):
        allowed, self._allowed = self._allowed, None
        allowed.release(1)

    def enter(self):
        self.waiting = len(self)
        if self._allowed is not None:
            assert self._allowed.acquire(timeout=60)


@pytest.fixture
def forwards(monkeypatch, eventually):
    counted, read = Forwards(eventually), Runner.read

    def counting(runner, chunks):
        counted.enter()
        counted.append(list(chunks))
        return read(runner, chunks)

    monkeypatch.setattr(Runner, "read", counting)
    return counted


@pytest.fixture(scope="module")
def index(make_model, ascii_folder, passages):
    return SequenceIndex.build(make_model(gen=ascii_folder), passages, progress=False)


@pytest.fixture(scope="module")
def generator(make_model, ascii_folder, index):
    return Generator(make_model(gen=ascii_folder), index, GenerationConfig(max_new_tokens=30), max_batch=PLACES)


@pytest.fixture
def server(serving, generator, index):
    with serving(generator, index, {"max_batch": PLACES}) as running:
        yield running


@pytest.mark.parametrize(("options", "steps"), [({"max_retrievals": 0}, 1), ({"ret_first": True}, 2)])
def test_a_request_that_arrives_while_15_run_writes_within_two_steps(server, forwards, options, steps, eventually):
    """One forward reads its prompt, a second one its passage; both carry the tokens of the others."""
    long = GenerationConfig(max_new_tokens=400, max_retrievals=0)
    others = [Job(Request(f"Question {n}?", config=long), Listener(), lambda ticket: None) for n in range(15)]

    def first_words(asked):
        with server.http.stream("POST", CHAT, json=asked | {"stream": True}) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return True
        return False

    forwards.close()
    with ThreadPoolExecutor(1) as pool:
        try:
            for job in others:
                server.engine.submit(job)
            forwards.allow(3)  # all of them write now, and the engine is about to run the next forward
            late = pool.submit(first_words, body(99, **options))
            eventually(lambda: server.engine.open == PLACES)
            before = len(forwards)
            forwards.allow(1 + steps)  # the one that was under way, and those that the request is given
            assert late.result(60)
        finally:
            forwards.open()
            for job in others:
                job.cancel()
    for chunks in forwards[before : before + 1 + steps]:
        assert sum(len(chunk.tokens) == 1 for chunk in chunks) == 15


def test_16_clients_take_as_many_forwards_as_a_batch_of_16(server, generator, forwards, eventually):
    """Though they come one by one: the first forward waits for nobody, the second one has all of them."""
    config = GenerationConfig(max_new_tokens=30, ret_first=True, max_retrievals=1)
    offline = generator.generate_all([Request(f"Question {n}?", config=config) for n in range(PLACES)])
    alone = len(forwards)
    forwards.clear()
    forwards.close()
    with ThreadPoolExecutor(PLACES) as pool:
        ask = {"ret_first": True, "max_retrievals": 1}
        replies = [pool.submit(server.http.post, CHAT, json=body(n, **ask)) for n in range(PLACES)]
        eventually(lambda: server.engine.open == PLACES)
        forwards.open()
        texts = [reply.result(60).json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [answer.text for answer in offline]
    assert len(forwards) <= 1.1 * alone


def test_a_step_wakes_the_event_loop_once(server, forwards, monkeypatch):
    """The tokens of 16 requests cross to the loop together, evidence and ends with them."""
    woken, call = [], asyncio.BaseEventLoop.call_soon_threadsafe

    def counting(loop, *arguments, **options):
        if threading.current_thread().name == "cosup-fast engine":
            woken.append(len(forwards))
        return call(loop, *arguments, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", counting)
    with ThreadPoolExecutor(PLACES) as pool:
        replies = list(pool.map(lambda n: server.http.post(CHAT, json=body(n, ret_first=True)), range(PLACES)))
    assert sum(reply.json()["usage"]["completion_tokens"] for reply in replies) == 30 * PLACES
    assert woken == sorted(set(woken))
    assert len(woken) <= len(forwards)


@pytest.mark.parametrize("where", ["read", "take"])
def test_an_engine_that_cannot_go_on_leaves_nobody_waiting(server, forwards, where, monkeypatch, eventually):
    """As after an error of a GPU, which every later call repeats: the step fails, and so does clearing its slots."""

    def broken(*_):
        raise RuntimeError("illegal memory access")

    forwards.close()
    with ThreadPoolExecutor(PLACES + 4) as pool:
        replies = [pool.submit(server.http.post, CHAT, json=body(n)) for n in range(PLACES + 4)]  # four of them wait
        eventually(lambda: server.engine.open == PLACES + 4)
        if where == "read":  # fails all that run
            monkeypatch.setattr(Runner, "read", broken)
        else:  # fails one of them, in the middle of a step
            monkeypatch.setattr(Task, "take", broken)
        monkeypatch.setattr(SlotCache, "clear", broken)
        forwards.open()
        statuses = [reply.result(60).status_code for reply in replies]
    assert set(statuses) == {500}
    assert server.engine.open == 0
    assert server.http.post(CHAT, json=body(0)).status_code == 503
    assert server.http.get("/ready").status_code == 503
    assert server.http.get("/health").status_code == 503
