"""POST /v1/chat/completions through the official client."""

import pytest

from cosup_fast.generation import Request

QUESTIONS = ["Who?", "碁 in 日本 👩‍👩‍👧‍👦 e\u0301?", "Say [NSP] and </s> [Cs]!", "x"]


def ask(client, question, **more):
    return client.chat.completions.create(
        model="co-supervised", messages=[{"role": "user", "content": question}], **more
    )


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_is_the_offline_one_with_its_evidence(server, generator, passages, question):
    corpus = {passage.id: passage for passage in passages}
    with server.client() as client:
        reply = ask(client, question, extra_body={"ret_first": True})
    config = generator.config.model_copy(update={"ret_first": True})
    expected = generator.generate_all([Request(question, config=config)])[0]
    choice = reply.choices[0]
    assert choice.message.content == expected.text
    assert choice.finish_reason == ("stop" if expected.stop_reason == "end" else "length")
    assert reply.usage.completion_tokens == expected.generated_tokens
    assert reply.usage.prompt_tokens == expected.prompt_tokens + expected.inserted_tokens
    grounded = [segment for segment in expected.segments if segment.passage and segment.text]
    cited = [one.url_citation for one in choice.message.annotations]
    assert [choice.message.content[one.start_index : one.end_index] for one in cited] == [s.text for s in grounded]
    assert [one.title for one in cited] == [corpus[s.passage].title for s in grounded]
    found = [c.passage for r in expected.retrievals for c in r.candidates]
    assert [one["id"] for one in reply.search_results] == found
    assert len(found) > 0
    assert [one["snippet"] for one in reply.search_results] == [corpus[name].text for name in found]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stream_is_the_whole_answer_with_evidence_before_its_words(server, question):
    with server.client() as client:
        options = {"extra_body": {"ret_first": True}, "stream_options": {"include_usage": True}}
        whole = ask(client, question, extra_body={"ret_first": True})
        text, annotations, results, finish, usage = "", [], [], [], None
        for chunk in ask(client, question, stream=True, **options):
            if chunk.usage is not None:
                usage = chunk.usage
                continue
            (choice,) = chunk.choices
            finish += [choice.finish_reason] * (choice.finish_reason is not None)
            new = getattr(chunk, "search_results", None)
            if choice.finish_reason:
                assert new == results
            elif new:
                assert {one["at"] for one in new} == {len(text)}
                results += new
            text += choice.delta.content or ""
            for one in getattr(choice.delta, "annotations", None) or []:
                assert one["url_citation"]["end_index"] <= len(text)
                assert one["url_citation"]["title"] in {result["title"] for result in results}
                assert one.pop("index") == len(annotations)
                annotations.append(one)
    assert text == whole.choices[0].message.content
    assert annotations == [one.model_dump() for one in whole.choices[0].message.annotations]
    assert [one["id"] for one in results] == [one["id"] for one in whole.search_results]
    assert finish == [whole.choices[0].finish_reason]
    assert usage == whole.usage


def test_the_stream_helper_of_the_client_puts_an_answer_together(server):
    """It merges the deltas of a list by their index."""
    options = {"extra_body": {"ret_first": True}}
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        with server.client() as client:
            whole = ask(client, question, **options).choices[0].message
            with client.chat.completions.stream(model="co-supervised", messages=messages, **options) as stream:
                stream.until_done()
                message = stream.current_completion_snapshot.choices[0].message
        assert message.content == whole.content
        merged = [one.url_citation for one in message.annotations or []]
        assert merged == [one.url_citation for one in whole.annotations]
