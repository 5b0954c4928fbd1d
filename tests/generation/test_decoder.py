"""Batches of requests against the plain decoder, and what one request may do to another: nothing."""

import threading
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from benchmarks.plain_decoder import plain_decode
from cosup_fast.generation import Decoder, GenerationConfig, Generator, Listener, Request, Ticket
from cosup_fast.generation.cache import SlotCache
from cosup_fast.index import SequenceIndex
from cosup_fast.model.attention import attending

QUESTIONS = [
    "Who?",
    "碁 in 日本 👩‍👩‍👧‍👦 e\u0301 \u202eabc?",
    "Say [NSP] and </s> [Cs]!",
    "x",
    "A longer question, " * 6,
]


def answered(decoder: Decoder, requests: list[Request]) -> list[Ticket]:
    tickets = [decoder.submit(request) for request in requests]
    while not decoder.idle:
        decoder.step()
    return tickets


def agree(model, retrieve, tickets: list[Ticket], *, text_only: bool = False) -> Counter:
    """Compares every answer with the plain decoder's; how they ended."""
    seen = Counter()
    for ticket in tickets:
        request, answer = ticket.request, ticket.result()
        with attending(model.gen.base_model, "eager"):  # transformers' own definition
            plain = plain_decode(
                model,
                retrieve,
                request.config,
                request.question,
                request.instruction,
                forced=request.forced,
                text_only=text_only,
                cache=False,
            )
        assert (answer.stop_reason, answer.text) == (plain.stop, plain.text)
        assert answer.generated_tokens == len(plain.generated)
        assert (answer.prompt_tokens, answer.inserted_tokens) == (len(plain.prompt), plain.inserted)
        assert answer.refed_tokens == plain.refed
        found = [[passage.id for passage, _ in one] for one in plain.found]
        assert [[c.passage for c in r.candidates] for r in answer.retrievals] == found
        for retrieval, expected in zip(answer.retrievals, plain.found, strict=True):
            assert [c.score for c in retrieval.candidates] == pytest.approx([score for _, score in expected], abs=1e-4)
        # Every token is read once, but for the one chosen last: at the end of the context it is [NSP] that was read.
        unread = not (answer.stop_reason == "context_length" and plain.context[-1] == model.template.nsp)
        total = answer.prompt_tokens + answer.generated_tokens + answer.inserted_tokens + answer.refed_tokens
        assert answer.processed_tokens == total - unread
        seen.update([answer.stop_reason, f"{len(found)} retrievals"])
        seen["read again"] += answer.refed_tokens > 0
    return seen


configs = st.builds(
    GenerationConfig,
    max_new_tokens=st.integers(1, 40),
    max_retrievals=st.integers(1, 3),
    ret_first=st.booleans(),
    ctx_truncate=st.booleans(),
    candidates=st.integers(1, 3),
    stop=st.sampled_from([[], [], ["a"], ["th", "e "]]),
)
requests = st.builds(
    Request,
    question=st.sampled_from(QUESTIONS) | st.text(st.characters(codec="utf-8"), max_size=12),
    instruction=st.sampled_from(["", "Do. "]),
    config=configs,
)
ARCHITECTURES = {
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": 12},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": 2.0},
    "phi": {},
    "qwen3": {"head_dim": 16},
}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny(request, make_folder, make_model, gpt2_folder):
    folder = gpt2_folder if request.param == "gpt2" else make_folder(request.param, **ARCHITECTURES[request.param])
    return make_model(gen=folder, embseq=gpt2_folder)


def test_batches_write_what_the_plain_decoder_writes(tiny, passages, randomize, retrieve_from):
    """Greedy and fp32, in batches of every size, with chunks of every size."""
    tiny.template.max_length, positions = 200, tiny.template.max_length
    seen = Counter()

    # The same examples on every run: in fp32 two likeliest tokens may be as near as rounding.
    @given(batch=st.lists(requests, min_size=1, max_size=7), slots=st.integers(1, 5), step=st.sampled_from([1, 7, 512]),
           seed=st.integers(0, 9))  # fmt: skip
    @settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
    def run(batch, slots, step, seed):
        randomize(tiny, seed)
        retrieve = retrieve_from(tiny, passages)
        decoder = Decoder(tiny, retrieve, max_batch=slots, step_tokens=step)
        tickets = answered(decoder, batch)
        assert decoder.runner.processed == sum(ticket.result().processed_tokens for ticket in tickets)
        seen.update(agree(tiny, retrieve, tickets))

    try:
        run()
    finally:
        tiny.template.max_length = positions
    names = ("1 retrievals", "read again", "max_new_tokens")
    if tiny.gen.config.model_type == "llama":  # not every architecture ends by itself with random weights
        names += ("end", "2 retrievals")
    assert min(seen[name] for name in names) > 0, seen


def test_the_plain_decoder_with_a_cache_is_the_one_without(make_model, passages, randomize, retrieve_from):
    model = make_model(dtype="float64")
    for seed in range(4):
        randomize(model, seed)
        config = GenerationConfig(max_new_tokens=40, max_retrievals=2, ret_first=True, ctx_truncate=seed % 2 == 1)
        with_cache, without = (
            plain_decode(model, retrieve_from(model, passages), config, "Who?", cache=cache) for cache in (True, False)
        )
        assert with_cache.context == without.context
        assert with_cache.processed < without.processed


def test_a_request_that_ends_makes_room_for_the_next(model, passages):
    at_once = []
    decoder = Decoder(model, lambda query, k: [(passages[0], 1.0)], max_batch=3)
    lengths = [9, 2, 5, 1, 7, 3, 4]
    tickets = [
        decoder.submit(Request("?", config=GenerationConfig(max_new_tokens=n, max_retrievals=0))) for n in lengths
    ]
    ended: list[Ticket] = []
    while not decoder.idle:
        ended += decoder.step()
        at_once.append(3 - decoder.free)
    assert set(ended) == set(tickets)
    assert max(at_once) <= 3
    # A request of n tokens takes n steps, and three run at once.
    assert len(at_once) <= -(-sum(lengths) // 3) + max(lengths)


def test_prompts_are_read_together_without_padding(model, passages, fed_tokens):
    decoder = Decoder(model, lambda query, k: [(passages[0], 1.0)], max_batch=4)
    prompts = [model.template.prompt(q) for q in QUESTIONS[:4]]
    config = GenerationConfig(max_new_tokens=2, max_retrievals=0)
    for question in QUESTIONS[:4]:
        decoder.submit(Request(question, config=config))
    _, fed = fed_tokens(model, decoder.step)
    assert fed == [token for prompt in prompts for token in prompt]


def test_the_queries_of_a_step_are_searched_together(model, passages, monkeypatch):
    index = SequenceIndex.build(model, passages, progress=False)
    calls: list[int] = []
    search = index.search
    monkeypatch.setattr(index, "search", lambda queries, k: calls.append(len(queries)) or search(queries, k))
    config = GenerationConfig(ret_first=True, max_retrievals=1, max_new_tokens=3, candidates=4)
    decoder = Decoder(model, index, config)
    own = Request("?", index=lambda query, k: [(passages[3], 0.5)])
    few = Request("??", config=config.model_copy(update={"candidates": 2}))
    tickets = answered(decoder, [Request(q) for q in QUESTIONS] + [own, few])
    assert calls == [len(QUESTIONS) + 1]
    assert [len(t.result().retrievals[0].candidates) for t in tickets] == [4] * len(QUESTIONS) + [1, 2]
    assert tickets[-2].result().retrievals[0].best.passage == passages[3].id
    alone = Generator(model, index, config).generate(QUESTIONS[1])
    assert [c.passage for c in tickets[1].result().retrievals[0].candidates] == [
        c.passage for c in alone.retrievals[0].candidates
    ]


def test_sampled_tokens_do_not_depend_on_the_neighbours(model, passages):
    def request(seed: int, question: str = "?") -> Request:
        config = GenerationConfig(temperature=1.5, top_p=0.9, seed=seed, max_new_tokens=25, max_retrievals=2)
        return Request(question, config=config)

    retrieve = lambda query, k: [(passages[3], 1.0)]  # noqa: E731
    alone = [answered(Decoder(model, retrieve), [request(seed)])[0].result() for seed in range(5)]
    others = [request(seed + 50, "Another question, and a longer one?") for seed in range(4)]
    together = answered(Decoder(model, retrieve, max_batch=4), [*others, *(request(seed) for seed in range(5))])
    assert [ticket.result() for ticket in together[4:]] == alone
    assert len({answer.text for answer in alone}) == 5


def test_cancelling_harms_nobody_else(model, passages):
    config = GenerationConfig(max_new_tokens=20, max_retrievals=0)
    retrieve = lambda query, k: [(passages[0], 1.0)]  # noqa: E731
    expected = Generator(model, retrieve, config).generate("Who?")
    decoder = Decoder(model, retrieve, config, max_batch=2)
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            first.cancel()

    first = decoder.submit(Request("Cancelled in mid-stream?"), on_text)
    others = [decoder.submit(Request("Who?")) for _ in range(3)]
    decoder.step()
    others[-1].cancel()  # while it waits
    list(decoder.run())
    assert first.result().stop_reason == "cancelled"
    assert first.result().text == "".join(pieces) != ""
    assert 3 <= first.result().generated_tokens < 20
    assert [ticket.result() for ticket in others[:2]] == [expected] * 2
    assert (others[-1].result().stop_reason, others[-1].result().text) == ("cancelled", "")
    assert decoder.idle
    assert decoder.free == 2


def test_requests_may_be_cancelled_from_another_thread(model, passages):
    decoder = Decoder(model, lambda query, k: [(passages[0], 1.0)], GenerationConfig(max_new_tokens=400))
    ticket = decoder.submit(Request("?", config=GenerationConfig(max_new_tokens=400, max_retrievals=0)))
    decoder.step()
    thread = threading.Thread(target=ticket.cancel)
    thread.start()
    thread.join()
    assert decoder.step() == [ticket]


def test_an_error_ends_its_own_request(model, passages, corpus):
    config = GenerationConfig(max_new_tokens=12, ret_first=True, max_retrievals=1)
    good = lambda query, k: [(corpus["go"], 1.0)]  # noqa: E731
    expected = Generator(model, good, config).generate("Who?")

    def angry(piece: str) -> None:
        raise RuntimeError("the reader is gone")

    def broken(query, k):
        raise KeyError("no such index")

    decoder = Decoder(model, good, config)
    text = model.template.encode("ab")[0]
    wrong = {
        "has .* tokens, more than the 512 positions": decoder.submit(Request("long " * 500)),
        "gave no passage": decoder.submit(Request("?", index=lambda query, k: [])),
        "no such index": decoder.submit(Request("?", index=broken)),
        "the reader is gone": decoder.submit(Request("?"), angry),
        r"forced has the token \d+ where the text is grounded": decoder.submit(
            Request("?", forced={1: text, 2: model.template.nsp})
        ),
    }
    right = [decoder.submit(Request("Who?")) for _ in range(3)]
    list(decoder.run())
    assert [ticket.result() for ticket in right] == [expected] * 3
    for message, ticket in wrong.items():
        assert ticket.answer.stop_reason == "error"
        with pytest.raises((ValueError, KeyError, RuntimeError), match=message):
            ticket.result()
        assert ticket.answer.error == str(ticket.exception)
    assert wrong["the reader is gone"].answer.retrievals[0].best.passage == "go"  # what was there is kept


def test_one_broken_query_spares_the_others(model, passages, monkeypatch):
    index = SequenceIndex.build(model, passages, progress=False)
    config = GenerationConfig(max_new_tokens=6, ret_first=True, max_retrievals=1)
    expected = Generator(model, index, config).generate("Who?")
    queries = model.queries

    def damage(hidden, rows):
        made = queries(hidden, rows)
        if len(made) > 1:
            made = made.clone()
            made[0] = torch.nan
        return made

    monkeypatch.setattr(type(model), "queries", lambda self, hidden, rows: damage(hidden, rows))
    tickets = answered(Decoder(model, index, config), [Request("What?"), Request("Who?"), Request("Who?")])
    with pytest.raises(ValueError, match="queries must be finite"):
        tickets[0].result()
    assert [c.passage for c in tickets[1].result().retrievals[0].candidates] == [
        c.passage for c in expected.retrievals[0].candidates
    ]
    assert tickets[2].result().text == expected.text


def test_a_slot_is_clean_after_an_error(make_model, passages):
    """What is not a number in a slot must not reach the next request, nor the neighbours that attend with it."""
    model = make_model()
    config = GenerationConfig(max_new_tokens=8, max_retrievals=0)
    retrieve = lambda query, k: [(passages[0], 1.0)]  # noqa: E731
    expected = Generator(model, retrieve, config).generate("Who?")
    poison = model.template.encode("~")[0]
    with torch.no_grad():
        model.gen.get_input_embeddings().weight[poison] = torch.nan
    decoder = Decoder(model, retrieve, config, max_batch=2)
    tickets = answered(decoder, [Request("~~ and a long question ~"), *[Request("Who?")] * 4])
    with pytest.raises(ValueError, match="logits are not numbers"):
        tickets[0].result()
    assert [ticket.result().text for ticket in tickets[1:]] == [expected.text] * 4


def test_all_passages_where_there_are_fewer_than_asked_for(model, passages):
    index = SequenceIndex.build(model, passages[:2], progress=False)
    config = GenerationConfig(ret_first=True, max_new_tokens=3, candidates=50)
    assert len(Generator(model, index, config).generate("?").retrievals[0].candidates) == 2


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"step_tokens": 0}])
def test_settings_of_a_decoder(model, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=0: expected at least 1"):
        Decoder(model, lambda query, k: [], **options)


def test_generate_all_keeps_the_order_and_asks_for_questions_as_it_goes(model, passages):
    pulled, ended = [], []

    def questions():
        for n in range(7):
            pulled.append((n, len(ended)))
            config = GenerationConfig(max_new_tokens=3 + 5 * (n % 3), max_retrievals=0)
            yield Request(f"Question {n}?", config=config) if n % 2 else f"Question {n}?"

    generator = Generator(
        model,
        lambda query, k: [(passages[0], 1.0)],
        GenerationConfig(max_new_tokens=6, max_retrievals=0),
        max_batch=2,
    )

    pieces: dict[int, str] = {}
    answers = generator.generate_all(
        questions(),
        on_text=lambda number, piece: pieces.update({number: pieces.get(number, "") + piece}),
        on_answer=lambda number, answer: ended.append(number),
    )
    assert sorted(ended) == list(range(7)) != ended
    assert pulled[0] == (0, 0)
    assert pulled[-1][1] >= 4  # the last question was asked for when there was room for it
    alone = [generator.generate(f"Question {n}?").text for n in (0, 2, 4, 6)]
    assert [answers[n].text for n in (0, 2, 4, 6)] == alone
    assert [pieces.get(n, "") for n in range(7)] == [answer.text for answer in answers]
    assert generator.generate_all([]) == []


def test_a_gen_that_cannot_be_cached_is_refused(make_model, monkeypatch):
    model = make_model()
    layer = model.gen.base_model.layers[1].self_attn
    layer.layer_idx = 0  # two layers with one cache
    with pytest.raises(ValueError, match=r"Gen \(LlamaForCausalLM\) cannot write with a cache of keys and values"):
        Decoder(model, lambda query, k: [])


def test_a_listener_hears_in_order_and_the_timeline_says_when(make_model, passages, randomize, retrieve_from):
    heard: list[tuple] = []

    class Heard(Listener):
        def on_text(self, piece):
            heard.append(("text", piece))

        def on_passages(self, found):
            heard.append(("passages", [passage.id for passage, _ in found]))

        def on_segment(self, start, end, passage):
            heard.append(("segment", start, end, passage))

    model = randomize(make_model(), 3)
    decoder = Decoder(model, retrieve_from(model, passages))
    config = GenerationConfig(max_new_tokens=40, max_retrievals=2, ret_first=True, candidates=2)
    ticket = decoder.submit(Request("Who?", config=config), listener=Heard())
    list(decoder.run())
    answer = ticket.result()
    assert heard[0] == ("passages", [c.passage for c in answer.retrievals[0].candidates])
    assert "".join(one[1] for one in heard if one[0] == "text") == answer.text
    segments = [one[1:] for one in heard if one[0] == "segment"]
    expected = [(s.text, s.passage) for s in answer.segments if s.passage is not None and s.text]
    assert [(answer.text[start:end], passage) for start, end, passage in segments] == expected
    phases, times = zip(*ticket.timeline, strict=True)
    assert phases[:3] == ("read", "retrieve", "read")
    assert phases.count("retrieve") == len(answer.retrievals)
    assert list(times) == sorted(times)
    with pytest.raises(ValueError, match="give one of them"):
        decoder.submit(Request("Who?"), print, listener=Heard())


def test_running_out_of_memory_ends_the_longest_request_alone(model, passages, monkeypatch):
    monkeypatch.setattr("cosup_fast.generation.cache.FIRST_CAPACITY", 32)
    config = GenerationConfig(max_new_tokens=12, max_retrievals=0)
    undisturbed = Decoder(model, lambda query, k: [(passages[0], 1.0)])
    expected = [undisturbed.submit(Request(text, config=config)) for text in ("Who?", "Where?")]
    list(undisturbed.run())

    decoder = Decoder(model, lambda query, k: [(passages[0], 1.0)])
    short = [decoder.submit(Request(text, config=config)) for text in ("Who?", "Where?")]
    for _ in range(3):
        decoder.step()
    allocate, allocated = SlotCache._zeros, 0

    def limited(cache, like, capacity):
        nonlocal allocated
        allocated += 1
        if allocated == 4:  # some layers are wider already
            raise torch.OutOfMemoryError("no room")
        return allocate(cache, like, capacity)

    monkeypatch.setattr(SlotCache, "_zeros", limited)
    long = decoder.submit(Request("so long " * 40, config=config))
    decoder.step()
    assert isinstance(long.exception, torch.OutOfMemoryError)
    assert long.answer is not None
    assert long.answer.stop_reason == "error"
    later = decoder.submit(Request("so long " * 40, config=config))
    list(decoder.run())
    assert [ticket.result().text for ticket in short] == [ticket.result().text for ticket in expected]
    assert later.result().generated_tokens == 12


def test_a_step_that_fails_can_be_aborted(model, passages, monkeypatch):
    decoder = Decoder(model, lambda query, k: [(passages[0], 1.0)], max_batch=1)
    running, waiting = decoder.submit(Request("Who?")), decoder.submit(Request("When?"))
    with monkeypatch.context() as patched:
        patched.setattr(type(decoder.runner), "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:
            decoder.step()
    assert decoder.abort(caught.value) == [running]
    assert running.exception is caught.value
    list(decoder.run())
    assert waiting.result().generated_tokens > 0
