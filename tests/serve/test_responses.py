"""POST /v1/responses through the official client."""

import pytest


def ask(client, question="Who?", **more):
    options = {"model": "co-supervised", "extra_body": {"ret_first": True}}
    return client.responses.create(**options, input=question, **more)


@pytest.mark.parametrize("question", ["Who?", "x", "囲碁?"])
def test_a_response_says_what_a_chat_completion_says(server, question):
    with server.client() as client:
        response = ask(client, question)
        chat = client.chat.completions.create(
            model="co-supervised", messages=[{"role": "user", "content": question}], extra_body={"ret_first": True}
        )
    message = chat.choices[0].message
    assert response.output_text == message.content
    cited = [one.url_citation.model_dump() for one in message.annotations]
    (written,) = [item for item in response.output if item.type == "message"]
    assert [one.model_dump(exclude={"type"}) for one in written.content[0].annotations] == cited
    calls = [item for item in response.output if item.type == "file_search_call"]
    assert [result.file_id for call in calls for result in call.results] == [one["id"] for one in chat.search_results]
    assert response.output[0].type == "file_search_call"  # ret_first
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.status == ("completed" if chat.choices[0].finish_reason == "stop" else "incomplete")


@pytest.mark.parametrize("question", ["Who?", "囲碁?"])
def test_the_events_of_a_stream_add_up_to_the_response(server, question):
    with server.client() as client:
        whole = ask(client, question)
        events = list(ask(client, question, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{whole.status}"
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    kinds = ("id", "created_at", "timeline", "output")

    def comparable(response):
        items = [item.model_dump(exclude={"id"}) for item in response.output]
        return response.model_dump(exclude=set(kinds)), items

    assert comparable(events[-1].response) == comparable(whole)
    written, cited = "", []
    for event in events:
        if event.type == "response.output_text.delta":
            written += event.delta
        elif event.type == "response.output_text.annotation.added":
            assert event.annotation_index == len(cited)
            assert event.annotation["end_index"] <= len(written) if isinstance(event.annotation, dict) else True
            cited.append(event.annotation)
    assert len(cited) > 0
    search = next(i for i, event in enumerate(events) if getattr(event, "item", None) and event.item.type != "message")
    assert search < events.index(deltas[0])


def test_a_response_can_be_sent_back_as_the_turn_before(server):
    """As the client's own examples do: `input += response.output`."""
    with server.client() as client:
        first = ask(client)
        assert first.output[0].type == "file_search_call"
        turns = [{"role": "user", "content": "Who?"}, *first.output, {"role": "user", "content": "And then?"}]
        second = ask(client, turns, max_output_tokens=5)
        spoken = [item for item in turns if isinstance(item, dict) or item.type == "message"]
        plain = ask(client, spoken, max_output_tokens=5)
    assert second.output_text == plain.output_text
    assert second.usage.input_tokens == plain.usage.input_tokens
