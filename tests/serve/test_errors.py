"""What a server refuses, and that the others are unharmed."""

import json
import re
import threading

import openai
import pytest
import torch

from cosup_fast.data import template
from cosup_fast.serve import passages

CHAT = "/v1/chat/completions"


def body(**changes):
    return {"model": "co-supervised", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 3} | changes


def messages(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        (messages(("user", "")), "messages.0.content", "empty"),
        (messages(("user", " \n")), "messages.0.content", "empty"),
        (messages(("user", "Who?"), ("assistant", "He.")), "messages.1.role", "must be the user's"),
        (messages(("user", "long " * 600)), "messages", "positions of Gen"),
        (messages(("tool", "x")), "messages.0.role", "'user'"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "Unicode text"),
        ({"tools": [{"type": "function"}]}, "tools", "'tools' is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"user": "me"}, "user", "not supported"),
        ({"n": 2}, "n", "1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"stop": [""]}, "stop", "empty text"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": 5}, "stop", "list"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"ret_first": True, "max_retrievals": 0}, "ret_first", "forbids"),
        ({"model": "closed-book", "ret_first": True}, "ret_first", "does not"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include", "not supported"),
    ],
)
def test_a_bad_request_is_told_which_field_is_wrong(server, changes, param, said):
    reply = server.http.post(CHAT, content=json.dumps(body(**changes)), headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "sent", "param", "said"),
    [
        ("responses", {"input": " "}, "input", "some text"),
        ("responses", {"input": []}, "input", "at least 1"),
        ("responses", {"input": 5}, "input", "list"),
        ("responses", {"input": [{"type": "file_search_call"}]}, "input.0", "message"),
        ("responses", {"input": [{"role": "user", "content": " "}], "instructions": "x"}, "input.0.content", "empty"),
        ("responses", {"input": [{"role": "user", "content": 5}]}, "input.0.content", "list"),
        ("search", {"query": "\t"}, "query", "some text"),
        ("search", {"query": ""}, "query", "some text"),
        ("search", {"query": "long " * 600}, "query", "positions of Gen"),
        ("embeddings", {"input": ["x", " "]}, "input.1", "some text"),
        ("embeddings", {"input": [{"title": "x"}]}, "input.0.text", "missing"),
        ("embeddings", {"input": [1, 2]}, "input.0", "dictionary"),
        ("embeddings", {"input": [[1, 2]]}, "input.0", "dictionary"),
        ("embeddings", {"input": []}, "input", "at least 1"),
        ("embeddings", {"input": "x " * 4000}, "input", "max_passage_tokens"),
    ],
)
def test_the_other_endpoints_name_the_field_that_is_wrong(server, path, sent, param, said):
    model = {} if path == "search" else {"model": "co-supervised"}
    reply = server.http.post(f"/v1/{path}", json=model | sent)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert not re.search(r"0x|function|\[", error["message"]), "the inside of the server"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "not valid JSON"), (b"[]", "JSON object"), (b"", "missing"), (b"[" * 100000, ""), (b"\xff{}", "")],
)
def test_a_body_that_is_no_object_is_refused(server, content, said):
    reply = server.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert "Traceback" not in reply.text
    assert "site-packages" not in reply.text


def test_the_official_client_raises_its_own_errors(server):
    with server.client() as client:
        with pytest.raises(openai.NotFoundError, match="did you mean 'closed-book'"):
            client.chat.completions.create(model="closed-bok", messages=body()["messages"])
        with pytest.raises(openai.BadRequestError, match="'logit_bias' is not supported"):
            client.chat.completions.create(**body(logit_bias={"1": 2}))
        with pytest.raises(openai.BadRequestError, match="positions of Gen"):
            client.responses.create(model="co-supervised", input="long " * 600, stream=True)


@pytest.mark.parametrize(
    "neutral",
    [
        {"frequency_penalty": 0, "tools": [], "logprobs": False, "user": None},
        {"response_format": {"type": "text"}},
        {"tool_choice": "none", "parallel_tool_calls": True, "metadata": {}},
    ],
)
def test_a_field_that_asks_for_nothing_is_taken(server, neutral):
    assert server.http.post(CHAT, json=body(**neutral)).status_code == 200


def test_unknown_paths_and_methods_have_the_shape_too(server):
    for reply, status in ((server.http.get("/v1/nothing"), 404), (server.http.get(CHAT), 405)):
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_special_tokens_and_control_characters_are_text(server, generator):
    """What a message says is never a command to the decoder, and comes back as it was."""
    for text in ("[NSP][Cs]</s>[Ce] <s>", "a\x00b\x1b[31m\x7f", "\u202eright to left"):
        reply = server.http.post(CHAT, json=body(**messages(("system", text), ("user", text)))).json()
        expected = len(generator.model.template.prompt(text, f"{text}\n\n"))
        assert reply["usage"]["prompt_tokens"] >= expected
        assert generator.model.template.nsp not in generator.model.template.prompt(text, text)


def test_earlier_messages_are_the_instruction(server, generator):
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    reply = server.http.post(CHAT, json=body(**messages(*turns), max_retrievals=0)).json()
    prompt = "Be brief.\n\n## Input:\n\nOne?## Output:\n\nYes.\n\n"
    assert reply["usage"]["prompt_tokens"] == len(generator.model.template.prompt("Two?", prompt))


def test_a_request_that_needs_too_much_memory_ends_alone(server, monkeypatch):
    cache = server.engine.decoder.runner.cache
    reserve = type(cache).reserve

    def limited(self, length):
        if length > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reserve(self, length)

    monkeypatch.setattr(type(cache), "reserve", limited)
    with server.client() as client:
        stream = client.chat.completions.create(**body(max_tokens=60, stream=True))
        first = next(iter(stream))
        reply = server.http.post(CHAT, json=body(**messages(("user", "so long " * 45))))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "out_of_memory"
    assert first.choices[0].delta.role == "assistant"
    assert text


def test_a_fault_of_the_server_is_told_without_its_trace(server, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("/secret/path broke")

    monkeypatch.setattr(type(server.engine.decoder.runner), "logits", broken)
    reply = server.http.post(CHAT, json=body())
    assert reply.status_code == 500
    error = reply.json()["error"]
    assert error["type"] == "server_error"
    assert "secret" not in reply.text
    assert "broke" in caplog.text
    monkeypatch.undo()
    assert server.http.post(CHAT, json=body()).status_code == 200


@pytest.mark.parametrize(
    ("path", "sent"), [("search", {"query": "Who?"}), ("embeddings", {"model": "co-supervised", "input": "Who?"})]
)
@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("/secret/path broke"), 500), (ValueError("/secret/path"), 500), (MemoryError(), 503)],
)
def test_a_fault_of_the_other_endpoints_has_the_shape_too(server, monkeypatch, caplog, path, sent, error, status):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(type(server.engine.generator), "query", broken)
    monkeypatch.setattr(passages, "embed_sequences", broken)
    reply = server.http.post(f"/v1/{path}", json=sent)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == "server_error"
    assert reply.json()["error"]["code"] == {500: "internal_error", 503: "out_of_memory"}[status]
    assert "secret" not in reply.text
    assert "secret" in caplog.text or status == 503
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    count = f'cosup_http_responses_total{{path="/v1/{path}",status="{status}"}}'
    assert count in server.http.get("/metrics").text
    monkeypatch.undo()
    assert server.http.post(f"/v1/{path}", json=sent).status_code == 200


@pytest.mark.parametrize(
    ("path", "sent", "param"),
    [
        ("chat/completions", body(**messages(("user", "word " * 4000))), "messages"),
        ("responses", {"model": "co-supervised", "input": "word " * 4000}, "input"),
        ("search", {"query": "word " * 4000}, "query"),
        ("embeddings", {"model": "co-supervised", "input": "word " * 4000}, "input"),
    ],
)
def test_a_text_far_too_long_is_refused_without_keeping_the_engine(server, monkeypatch, path, sent, param):
    """A megabyte takes a second to tokenize, for which every request that is writing would wait."""
    threads, encode = [], template._encode_all

    def watched(tokenizer, texts):
        threads.append(threading.current_thread().name)
        return encode(tokenizer, texts)

    monkeypatch.setattr(template, "_encode_all", watched)
    error = server.http.post(f"/v1/{path}", json=sent).json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert len(threads) > 0
    assert "cosup-fast engine" not in threads
