"""What a server refuses, and that the others are unharmed."""

import json

import openai
import pytest
import torch

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
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None, ""),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, ""),
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
        ({"ret_first": True, "max_retrievals": 0}, "ret_first", "forbids"),
        ({"model": "closed-book", "ret_first": True}, "ret_first", "does not"),
        ({"stream_options": {"include": 1}}, "stream_options.include", "not supported"),
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
