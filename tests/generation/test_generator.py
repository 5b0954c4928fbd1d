"""One request at a time: the same tokens as the plain decoder, the grammar, sampling, text, and what is refused."""

import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.plain_decoder import plain_decode
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.data.template import CONTEXT_END, IGNORE, NSP, gap
from cosup_fast.generation import Answer, Decoder, GenerationConfig, Generator, Grammar, Request, State, choose
from cosup_fast.index import SequenceIndex, embed_queries

SPECIAL = ("<s>", "</s>", "[NSP]", "[Cs]", "[Ce]", "[PAD]")


CASES = [
    {"max_new_tokens": 40, "max_retrievals": 3, "ret_first": True},
    {"max_new_tokens": 60, "max_retrievals": 2},
    {"max_new_tokens": 25, "max_retrievals": 0},
    {"max_new_tokens": 50, "max_retrievals": 4, "ret_first": True, "max_length": 150},
    {"max_new_tokens": 1, "max_retrievals": 1, "ret_first": True},
    {"max_new_tokens": 30, "max_retrievals": 1, "candidates": 2},
]
QUESTIONS = ["Who?", "碁 in 日本 👩‍👩‍👧‍👦 e\u0301 \u202eabc?", "Say [NSP] and </s> [Cs]!", "x"]


@pytest.mark.parametrize("truncate", [False, True], ids=["passages stay", "passages go"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_same_tokens_as_recomputing_everything(
    make_model, gpt2_folder, llama_folder, passages, randomize, retrieve_from, fed_tokens, architecture, truncate
):
    folder = gpt2_folder if architecture == "gpt2" else llama_folder
    model = make_model(gen=folder, dtype="float64")
    positions = model.template.max_length
    seen = Counter()
    for seed in range(36):
        randomize(model, seed)
        case = dict(CASES[seed % len(CASES)])
        model.template.max_length = case.pop("max_length", positions)
        config = GenerationConfig(**case, ctx_truncate=truncate)
        question, instruction = QUESTIONS[seed % len(QUESTIONS)], "Do. " * (seed % 3)
        retrieve = retrieve_from(model, passages)
        plain = plain_decode(model, retrieve, config, question, instruction, cache=False)
        answer, fed = fed_tokens(model, lambda: Generator(model, retrieve, config).generate(question, instruction))  # noqa: B023
        if truncate:
            assert len(fed) == answer.processed_tokens
        else:
            assert fed == plain.context  # every token once: nothing is processed again after a retrieval
        assert (answer.stop_reason, answer.text) == (plain.stop, plain.text)
        assert answer.generated_tokens == len(plain.generated)
        assert (answer.inserted_tokens, answer.refed_tokens) == (plain.inserted, plain.refed)
        assert answer.prompt_tokens == len(plain.prompt)
        found = plain.found
        assert [[c.passage for c in r.candidates] for r in answer.retrievals] == [[p.id for p, _ in f] for f in found]
        for retrieval, expected in zip(answer.retrievals, found, strict=True):
            assert [c.score for c in retrieval.candidates] == pytest.approx([score for _, score in expected], abs=1e-5)
        closed = model.template.context_end in plain.generated
        seen.update([plain.stop, f"{len(found)} retrievals", "closed" if closed else "open"])
    model.template.max_length = positions
    assert min(seen[stop] for stop in ("end", "max_new_tokens")) >= 2, seen
    assert truncate or seen["context_length"] >= 2, seen
    assert min(seen[f"{n} retrievals"] for n in range(4)) >= 1, seen
    assert min(seen["closed"], seen["open"]) >= 5, seen


def test_truncation_reads_the_grounded_text_where_the_passage_stood(model, corpus, fed_tokens):
    template = model.template
    first, second = template.encode("one"), template.encode("two")
    script = [template.nsp, *first, template.context_end, template.nsp, *second, template.context_end, template.eos]
    config = GenerationConfig(ctx_truncate=True, max_new_tokens=50)
    decoder = Decoder(model, lambda query, k: [(corpus["go"], 1.0)], config)
    ticket = decoder.submit(Request("?", forced=dict(enumerate(script))))
    _, fed = fed_tokens(model, lambda: list(decoder.run()))
    passage = [*template.inserted_passage(corpus["go"]), template.context_start]
    asked, again = [template.nsp, *passage], [template.context_start]
    assert fed == [
        *template.prompt("?"),
        *[*asked, *first], *[*again, *first, template.context_end],
        *[*asked, *second], *[*again, *second, template.context_end],
    ]  # fmt: skip
    assert ticket.result().refed_tokens == 2 + len(first) + len(second)
    assert ticket.result().processed_tokens == len(fed)


@pytest.fixture
def write(model, fed_tokens):
    """A function that lets Gen write a script of tokens while the rest runs as it is."""

    def run(script, retrieve, on_text=None, **config) -> tuple[Answer, list[int]]:
        decoder = Decoder(model, retrieve, GenerationConfig(**config), max_batch=1)
        ticket = decoder.submit(Request(run.question, run.instruction, forced=dict(enumerate(script))), on_text)
        _, fed = fed_tokens(model, lambda: list(decoder.run()))
        return ticket.result(), fed

    run.question, run.instruction = "?", ""
    return run


segments = st.builds(
    Segment,
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip),
    passage=st.none() | st.sampled_from(["paris", "short", "marks", "emoji", "go"]),
)


@given(output=st.lists(segments, max_size=4), question=st.text(st.characters(codec="utf-8"), max_size=9))
@settings(max_examples=25, deadline=None)
def test_writing_a_training_output_gives_the_training_sequence(model, corpus, fed_tokens, output, question):
    """Training and inference agree: same context, same queries, and the segments come back."""
    example = Example(id="x", question=question + "?", instruction="I. ", output=output)
    sequence = model.template.gen_sequence(example, corpus)
    queries: list[torch.Tensor] = []

    def retrieve(query, k):
        queries.append(query)
        return [(corpus[sequence.query_passages[len(queries) - 1]], 0.5)]

    script = [label for label in sequence.labels if label != IGNORE]
    decoder = Decoder(model, retrieve, GenerationConfig(max_new_tokens=500))
    ticket = decoder.submit(Request(example.question, example.instruction, forced=dict(enumerate(script))))
    _, fed = fed_tokens(model, lambda: list(decoder.run()))
    answer = ticket.result()
    assert fed == sequence.input_ids[:-1]
    assert answer.stop_reason == "end"
    merged: list[tuple[str, str | None]] = []  # neighbouring free segments are one stretch of text
    written = ""
    for segment in output:
        text = gap(written, segment.text) + segment.text
        written += text
        if merged and segment.passage is None and merged[-1][1] is None:
            merged[-1] = (merged[-1][0] + text, None)
        else:
            merged.append((text, segment.passage))
    assert [(segment.text, segment.passage) for segment in answer.segments] == merged
    assert answer.text == written
    assert answer.prompt_tokens + answer.generated_tokens + answer.inserted_tokens == len(sequence.input_ids)
    expected, _ = embed_queries(model, [example], corpus)
    if queries:
        torch.testing.assert_close(torch.stack(queries), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_wild_sampling_obeys_the_grammar(make_model, passages, randomize, fed_tokens, seed):
    model = randomize(make_model(), seed)
    template = model.template
    config = GenerationConfig(max_new_tokens=80, max_retrievals=seed % 4, temperature=20.0, seed=seed)
    with torch.no_grad():
        head = model.gen.get_output_embeddings().weight
        head[template.nsp] *= 4
        head[template.context_end] *= 3
    generator = Generator(model, lambda query, k: [(passages[seed % 8], 0.0)], config)
    answer, fed = fed_tokens(model, lambda: generator.generate("Say [NSP]?"))
    names = {template.nsp: "N", template.context_start: "C", template.context_end: "E"}
    others = {template.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL} - set(names)
    assert others.isdisjoint(fed)
    assert max(fed) < len(template.tokenizer)
    spelled = "".join(names.get(token, ".") for token in fed)
    assert re.fullmatch(r"\.*(N\.*C\.*E\.*)*(N(\.*C\.*)?)?", spelled), spelled
    assert spelled.count("N") == len(answer.retrievals) <= config.max_retrievals
    assert answer.stop_reason in ("end", "max_new_tokens")
    if answer.stop_reason == "end":
        assert spelled.count("C") == spelled.count("E")


def test_grammar(model):
    template = model.template
    vocabulary = len(template.tokenizer) + 5
    grammar = Grammar(template, vocabulary)
    structure = {template.nsp, template.context_start, template.context_end, template.pad, template.eos}
    never = {template.tokenizer.bos_token_id, *range(len(template.tokenizer), vocabulary)}

    def allowed(state, may_retrieve) -> set[int]:
        # In a batch: each row has its own place in the text.
        states, may = [State.FREE, state, State.GROUNDED], [False, may_retrieve, True]
        row = grammar.restrict(torch.zeros(3, vocabulary), states, may)[1]
        tokens = set((row == 0).nonzero()[:, 0].tolist())
        for token in range(vocabulary):
            if token in tokens:
                grammar.check(state, may_retrieve, token)
            else:
                with pytest.raises(ValueError, match=rf"forced has the token {token} where the text is {state.value}"):
                    grammar.check(state, may_retrieve, token)
        assert never.isdisjoint(tokens)
        assert len(tokens - structure) == vocabulary - len(structure | never)
        return structure & tokens

    assert allowed(State.FREE, True) == {template.nsp, template.eos}
    assert allowed(State.FREE, False) == {template.eos}
    for may_retrieve in (True, False):
        assert allowed(State.GROUNDED, may_retrieve) == {template.context_end}
    text = template.encode("a")[0]
    assert [grammar.next(State.FREE, t) for t in (text, template.nsp, template.eos)] == [
        State.FREE, State.PASSAGE, State.END,
    ]  # fmt: skip
    assert grammar.next(State.PASSAGE, template.context_start) is State.GROUNDED
    assert [grammar.next(State.GROUNDED, t) for t in (text, template.context_end)] == [State.GROUNDED, State.FREE]
    with pytest.raises(AssertionError, match="nothing is chosen"):
        grammar.restrict(torch.zeros(1, vocabulary), [State.PASSAGE], [True])
    for token in (-1, vocabulary):
        with pytest.raises(ValueError, match=f"the token {token} "):
            grammar.check(State.FREE, True, token)


def test_ret_first_asks_before_anything_else(model, passages, fed_tokens):
    index = SequenceIndex.build(model, passages, progress=False)
    config = GenerationConfig(ret_first=True, max_new_tokens=4, max_retrievals=1, candidates=3)
    answer, fed = fed_tokens(model, lambda: Generator(model, index, config).generate("?"))
    prompt = model.template.prompt("?")
    assert fed[: len(prompt) + 1] == [*prompt, model.template.nsp]
    queries, _ = embed_queries(model, [Example(id="q", question="?", output=[], gold=["paris"])], {})
    expected = index.retrieve(queries[0], 3)
    assert [c.passage for c in answer.retrievals[0].candidates] == [p.id for p, _ in expected]
    assert [c.title for c in answer.retrievals[0].candidates] == [p.title for p, _ in expected]
    assert answer.retrievals[0].best == answer.retrievals[0].candidates[0]
    assert answer.segments[0].passage == expected[0][0].id


def test_pieces_of_text_are_whole_characters_and_add_up(write, model, corpus):
    template = model.template
    free, grounded = "囲碁 👩‍👩‍👧‍👦 ", "é e\u0301 \u202e✓\u202c ﷽"
    script = [*template.encode(free), template.nsp, *template.encode(grounded), template.context_end, template.eos]
    pieces: list[str] = []
    answer, _ = write(script, lambda query, k: [(corpus["go"], 1.0)], pieces.append)
    assert "".join(pieces) == answer.text == free + grounded
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 12


def test_half_a_character_at_the_end_shows_as_such(write, model):
    whole = model.template.encode("碁")
    pieces: list[str] = []
    answer, _ = write([*model.template.encode("ab"), *whole[:-1]], None, pieces.append, max_new_tokens=1 + len(whole))
    assert answer.text == "".join(pieces) == "ab\ufffd"


def test_empty_answers_and_empty_segments(write, model, corpus):
    template = model.template
    answer, _ = write([template.eos], None)
    assert (answer.text, answer.segments, answer.stop_reason, answer.generated_tokens) == ("", (), "end", 1)
    script = [template.nsp, template.context_end, template.nsp, template.context_end, template.eos]
    answer, _ = write(script, lambda query, k: [(corpus["go"], 1.0)])
    assert [(s.text, s.passage) for s in answer.segments] == [("", "go"), ("", "go")]


@pytest.mark.parametrize("text", [NSP, CONTEXT_END, "</s>"])
def test_special_text_in_a_question_or_passage_changes_nothing(write, model, text):
    passage = Passage(id="p", title=text, text=f"{text} {text}")
    write.question, write.instruction = text, text
    template = model.template
    script = [template.nsp, *template.encode("ok"), template.context_end, template.eos]
    answer, fed = write(script, lambda query, k: [(passage, 1.0)])
    assert answer.text == "ok"
    assert [fed.count(t) for t in (template.nsp, template.context_start, template.context_end)] == [1, 1, 1]
    assert template.eos not in fed


def test_the_passage_must_fit(write, model, corpus, monkeypatch):
    template = model.template
    given = len(template.inserted_passage(corpus["paris"])) + 1
    prompt = len(template.prompt("?"))
    script = [template.nsp, *template.encode("ok"), template.context_end, template.eos]

    def run(room: int) -> Answer:
        monkeypatch.setattr(template, "max_length", prompt + room)
        answer, fed = write(script, lambda query, k: [(corpus["paris"], 1.0)])
        assert len(fed) <= prompt + room
        return answer

    whole = run(1 + given + len(script) - 2)
    assert (whole.stop_reason, whole.text, whole.inserted_tokens) == ("end", "ok", given)
    cut = run(1 + given + len(script) - 3)
    assert (cut.stop_reason, cut.text, cut.inserted_tokens) == ("context_length", "ok", given)
    barely = run(1 + given)
    assert (barely.stop_reason, barely.segments[0].passage, barely.inserted_tokens) == (
        "context_length",
        "paris",
        given,
    )
    missed = run(given)
    assert (missed.stop_reason, missed.segments, missed.inserted_tokens) == ("context_length", (), 0)
    assert missed.retrievals[0].best.passage == "paris"
    unasked = run(0)
    assert (unasked.stop_reason, unasked.retrievals, unasked.generated_tokens) == ("context_length", (), 1)


def test_what_cannot_be_answered_is_refused(model, make_model, corpus):
    def take(name):
        return lambda query, k: [(corpus[name], 0.0)] if name else []

    with pytest.raises(ValueError, match=r"'long long .* has \d+ tokens, more than the 512 positions of Gen"):
        Generator(model, take("go")).generate("long " * 500)
    ask = GenerationConfig(ret_first=True, max_new_tokens=5)
    with pytest.raises(ValueError, match="no passage"):
        Generator(model, take(None), ask).generate("?")
    small = make_model(text={"max_passage_tokens": 10})
    with pytest.raises(ValueError, match=r"'long' has \d+ tokens, more than text.max_passage_tokens=10"):
        Generator(small, take("long"), ask).generate("?")
    broken = make_model()
    with torch.no_grad():
        broken.gen.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not numbers"):
        Generator(broken, take("go")).generate("?")


def test_long_passages_are_cut_where_the_template_says_so(make_model, corpus):
    model = make_model(text={"max_passage_tokens": 10, "long_passages": "truncate"})
    config = GenerationConfig(ret_first=True, max_new_tokens=5)
    answer = Generator(model, lambda query, k: [(corpus["long"], 0.0)], config).generate("?")
    assert answer.inserted_tokens == 11


def test_generation_leaves_no_trace_on_the_model(make_model, gpt2_folder, passages):
    model = make_model(gen=gpt2_folder)
    generator = Generator(model, SequenceIndex.build(model, passages, progress=False), GenerationConfig(ret_first=True))
    expected = generator.generate("Who?")
    model.train()
    assert generator.generate("Who?") == expected  # GPT-2 has dropout
    assert all(module.training for module in model.modules())
    assert generator.generate("Who?") == expected  # nothing of an answer stays in the generator


HEADS = [("phi", {}), ("granite", {"logits_scaling": 8.0}), ("gemma3_text", {"final_logit_softcapping": 3.0})]


@pytest.mark.parametrize(("kind", "options"), HEADS, ids=[kind for kind, _ in HEADS])
@torch.no_grad()
def test_tokens_are_chosen_from_the_logits_of_the_model(
    make_model, make_folder, corpus, monkeypatch, fed_tokens, kind, options
):
    model = make_model(gen=make_folder(kind, head_dim=8, **options), shared=True)
    steps: list[torch.Tensor] = []

    def record(logits, config, random):
        steps.append(logits)
        return choose(logits, config, random)

    monkeypatch.setattr("cosup_fast.generation.decoder.choose", record)
    config = GenerationConfig(ret_first=True, max_new_tokens=8, max_retrievals=1, temperature=1e-300)
    generator = Generator(model, lambda query, k: [(corpus["go"], 0.0)], config)
    _, fed = fed_tokens(model, lambda: generator.generate("?"))
    expected = model.gen(torch.tensor([fed])).logits[0][-len(steps) :]
    assert len(steps) > 2
    for ours, theirs in zip(steps, expected, strict=True):
        allowed = ours > -torch.inf
        torch.testing.assert_close(ours[allowed], theirs[allowed], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("instruction", ["", "Answer in full. "])
def test_query_is_that_of_an_output_that_begins_with_a_retrieval(model, passages, fed_tokens, instruction):
    seen: list[torch.Tensor] = []

    def retrieve(query, k):
        seen.append(query)
        return [(passages[0], 0.0)]

    generator = Generator(model, retrieve, GenerationConfig(ret_first=True, max_new_tokens=2))
    query, fed = fed_tokens(model, lambda: generator.query("Who?", instruction))
    assert fed == [*model.template.prompt("Who?", instruction), model.template.nsp]
    assert seen == []
    generator.generate("Who?", instruction)
    torch.testing.assert_close(query, seen[0], atol=2e-6, rtol=0)
    asked = Example(id="q", question="Who?", instruction=instruction, output=[], gold=["paris"])
    torch.testing.assert_close(query, embed_queries(model, [asked], {})[0][0], atol=2e-6, rtol=0)
    index = SequenceIndex.build(model, passages, progress=False)
    assert len(index.retrieve(query, 3)) == 3


def test_query_must_fit(model, monkeypatch):
    generator = Generator(model, lambda query, k: [])
    prompt = len(model.template.prompt("Who?"))
    monkeypatch.setattr(model.template, "max_length", prompt + 1)
    assert generator.query("Who?").norm() == pytest.approx(1)
    monkeypatch.setattr(model.template, "max_length", prompt)
    with pytest.raises(ValueError, match=rf"'Who\?' has {prompt + 1} tokens, more than the {prompt} positions of Gen"):
        generator.query("Who?")


def test_settings(model):
    with pytest.raises(ValueError, match="ret_first=true forces a retrieval and max_retrievals=0 forbids it"):
        GenerationConfig(ret_first=True, max_retrievals=0)
    for wrong in ({"top_p": 0}, {"temperature": -1}, {"max_new_tokens": 0}, {"beams": 2}, {"candidates": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GenerationConfig(**wrong)
    assert Generator(model, lambda query, k: []).config == GenerationConfig()


def test_closed_book(model):
    answer = Generator(model, lambda query, k: [], GenerationConfig(max_retrievals=0, max_new_tokens=9)).generate("?")
    assert answer.retrievals == ()
    assert all(segment.passage is None for segment in answer.segments)


def test_answer_survives_json(model, passages):
    index = SequenceIndex.build(model, passages, progress=False)
    answer = Generator(model, index, GenerationConfig(ret_first=True, max_new_tokens=12)).generate("?")
    assert Answer.model_validate_json(answer.model_dump_json()) == answer
