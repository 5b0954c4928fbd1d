import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cosup_fast.data.packing import Pack
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.data.template import CONTEXT_END, IGNORE, NSP
from cosup_fast.generation import Answer, GenerationConfig, Generator, Grammar, State, choose
from cosup_fast.index import SequenceIndex, embed_queries

SPECIAL = ("<s>", "</s>", "[NSP]", "[Cs]", "[Ce]", "[PAD]")


@torch.no_grad()
def randomize(model, seed: int):
    """New random weights that choose [NSP], [Ce] and </s> often enough to see every transition."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            parameter.normal_(0, 0.3, generator=random)
    head, template = model.gen.get_output_embeddings().weight, model.template
    for token, size in ((template.nsp, 2.5), (template.context_end, 4.0), (template.eos, 2.0)):
        head[token] *= size
    return model


def retrieve_from(model, passages):
    """Exact search by Embseq's hidden states, one passage at a time."""
    embeddings = torch.cat([model.embed(Pack.of([model.template.sequence(p)])) for p in passages])

    def retrieve(query, k):
        scores = embeddings @ query
        return [(passages[row], float(scores[row])) for row in scores.argsort(descending=True)[:k].tolist()]

    return retrieve


@torch.no_grad()
def plain_decode(model, passages, config: GenerationConfig, question: str, instruction: str = ""):
    """Greedy decoding from the definition: everything is computed again for every token, with eager attention.

    Returns the tokens of the context, how many of them were generated and inserted, the passages and why it ended.
    """
    template, tokenizer = model.template, model.template.tokenizer
    retrieve = retrieve_from(model, passages)
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    model.gen.set_attn_implementation("eager")
    try:
        ids = template.prompt(question, instruction)
        inside, generated, inserted, found = False, [], 0, []
        while True:
            hidden = model.gen.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
            logits = model.gen.get_output_embeddings()(hidden)
            banned = special - ({template.context_end} if inside else {template.eos, template.nsp})
            if len(found) == config.max_retrievals:
                banned.add(template.nsp)
            logits[list(banned)] = -torch.inf
            logits[len(tokenizer) :] = -torch.inf
            token = template.nsp if config.ret_first and not generated else int(logits.argmax())
            generated.append(token)
            if token == template.eos:
                return ids, generated, inserted, found, "end"
            if len(generated) == config.max_new_tokens:
                return ids, generated, inserted, found, "max_new_tokens"
            if len(ids) == template.max_length:
                return ids, generated, inserted, found, "context_length"
            ids = [*ids, token]
            if token == template.context_end:
                inside = False
            if token == template.nsp:
                hidden = model.gen.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
                found.append(retrieve(torch.nn.functional.normalize(hidden, dim=0), config.candidates))
                given = [*template.inserted_passage(found[-1][0][0]), template.context_start]
                if len(ids) + len(given) > template.max_length:
                    return ids, generated, inserted, found, "context_length"
                ids, inserted, inside = ids + given, inserted + len(given), True
    finally:
        model.gen.set_attn_implementation("packed_sdpa")


def fed_tokens(model, run):
    """What `run()` returns, and the tokens that Gen's backbone read, in order."""
    fed: list[int] = []

    def record(module, args, kwargs):
        fed.extend(kwargs["input_ids"][0].tolist())

    hook = model.gen.base_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        return run(), fed
    finally:
        hook.remove()


CASES = [
    {"max_new_tokens": 40, "max_retrievals": 3, "ret_first": True},
    {"max_new_tokens": 60, "max_retrievals": 2},
    {"max_new_tokens": 25, "max_retrievals": 0},
    {"max_new_tokens": 50, "max_retrievals": 4, "ret_first": True, "max_length": 150},
    {"max_new_tokens": 1, "max_retrievals": 1, "ret_first": True},
    {"max_new_tokens": 30, "max_retrievals": 1, "candidates": 2},
]
QUESTIONS = ["Who?", "碁 in 日本 👩‍👩‍👧‍👦 e\u0301 \u202eabc?", "Say [NSP] and </s> [Cs]!", "x"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_same_tokens_as_recomputing_everything(make_model, gpt2_folder, llama_folder, passages, architecture):
    folder = gpt2_folder if architecture == "gpt2" else llama_folder
    model = make_model(gen=folder, dtype="float64")
    positions = model.template.max_length
    seen = Counter()
    for seed in range(36):
        randomize(model, seed)
        case = dict(CASES[seed % len(CASES)])
        model.template.max_length = case.pop("max_length", positions)
        config = GenerationConfig(**case)
        question, instruction = QUESTIONS[seed % len(QUESTIONS)], "Do. " * (seed % 3)
        ids, generated, inserted, found, stop = plain_decode(model, passages, config, question, instruction)
        generator = Generator(model, retrieve_from(model, passages), config)
        answer, fed = fed_tokens(model, lambda: generator.generate(question, instruction))  # noqa: B023
        assert fed == ids  # every token once: nothing is processed again after a retrieval
        assert answer.stop_reason == stop
        assert answer.generated_tokens == len(generated)
        assert answer.inserted_tokens == inserted
        assert answer.prompt_tokens == len(model.template.prompt(question, instruction))
        assert [[c.passage for c in r.candidates] for r in answer.retrievals] == [[p.id for p, _ in f] for f in found]
        for retrieval, expected in zip(answer.retrievals, found, strict=True):
            assert [c.score for c in retrieval.candidates] == pytest.approx([score for _, score in expected], abs=1e-5)
        seen.update([stop, f"{len(found)} retrievals", "closed" if model.template.context_end in generated else "open"])
    assert min(seen[stop] for stop in ("end", "max_new_tokens", "context_length")) >= 2, seen
    assert min(seen[f"{n} retrievals"] for n in range(4)) >= 1, seen
    assert min(seen["closed"], seen["open"]) >= 5, seen


@pytest.fixture
def write(model, monkeypatch):
    """A function that lets Gen write a script of tokens while the rest runs as it is."""

    def run(script, retrieve, on_text=None, **config) -> tuple[Answer, list[int]]:
        tokens = iter(script)

        def scripted(logits, config, random):
            token = next(tokens)
            assert logits[token] > -torch.inf, f"{model.template.tokenizer.decode([token])!r} is banned here"
            return token

        monkeypatch.setattr("cosup_fast.generation.choose", scripted)
        generator = Generator(model, retrieve, GenerationConfig(**config))
        return fed_tokens(model, lambda: generator.generate(run.question, run.instruction, on_text))

    run.question, run.instruction = "?", ""
    return run


segments = st.builds(
    Segment,
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip),
    passage=st.none() | st.sampled_from(["paris", "short", "marks", "emoji", "go"]),
)


@given(output=st.lists(segments, max_size=4), question=st.text(st.characters(codec="utf-8"), max_size=9))
@settings(max_examples=25, deadline=None)
def test_writing_a_training_output_gives_the_training_sequence(model, corpus, output, question):
    """Training and inference agree: same context, same queries, and the segments come back."""
    example = Example(id="x", question=question + "?", instruction="I. ", output=output)
    sequence = model.template.gen_sequence(example, corpus)
    queries: list[torch.Tensor] = []

    def retrieve(query, k):
        queries.append(query)
        return [(corpus[sequence.query_passages[len(queries) - 1]], 0.5)]

    with pytest.MonkeyPatch.context() as patch:
        script = iter([label for label in sequence.labels if label != IGNORE])
        patch.setattr("cosup_fast.generation.choose", lambda logits, config, random: next(script))
        generator = Generator(model, retrieve, GenerationConfig(max_new_tokens=500))
        answer, fed = fed_tokens(model, lambda: generator.generate(example.question, example.instruction))
    assert fed == sequence.input_ids[:-1]
    assert answer.stop_reason == "end"
    merged: list[tuple[str, str | None]] = []  # neighbouring free segments are one stretch of text
    for segment in output:
        if merged and segment.passage is None and merged[-1][1] is None:
            merged[-1] = (merged[-1][0] + segment.text, None)
        else:
            merged.append((segment.text, segment.passage))
    assert [(segment.text, segment.passage) for segment in answer.segments] == merged
    assert answer.text == "".join(segment.text for segment in output)
    assert answer.prompt_tokens + answer.generated_tokens + answer.inserted_tokens == len(sequence.input_ids)
    expected, _ = embed_queries(model, [example], corpus)
    if queries:
        torch.testing.assert_close(torch.stack(queries), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_wild_sampling_obeys_the_grammar(make_model, passages, seed):
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
    grammar = Grammar(template, 305)
    structure = {template.nsp, template.context_start, template.context_end, template.pad, template.eos}

    def structural(mask) -> set[int]:
        return structure & set(mask.nonzero()[:, 0].tolist())

    assert structural(grammar.allowed(State.FREE, True)) == {template.nsp, template.eos}
    assert structural(grammar.allowed(State.FREE, False)) == {template.eos}
    for may_retrieve in (True, False):
        assert structural(grammar.allowed(State.GROUNDED, may_retrieve)) == {template.context_end}
    for mask in (grammar.allowed(State.FREE, True), grammar.allowed(State.GROUNDED, True)):
        assert not mask[len(template.tokenizer) :].any()
        assert not mask[template.tokenizer.bos_token_id]
    text = template.encode("a")[0]
    assert [grammar.next(State.FREE, t) for t in (text, template.nsp, template.eos)] == [
        State.FREE, State.PASSAGE, State.END,
    ]  # fmt: skip
    assert grammar.next(State.PASSAGE, template.context_start) is State.GROUNDED
    assert [grammar.next(State.GROUNDED, t) for t in (text, template.context_end)] == [State.GROUNDED, State.FREE]
    with pytest.raises(AssertionError, match="nothing is chosen"):
        grammar.allowed(State.PASSAGE, True)


def test_ret_first_asks_before_anything_else(model, passages):
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


def test_a_prompt_beyond_the_sliding_window(make_model, mistral_folder, gpt2_folder, passages):
    model = make_model(gen=mistral_folder, embseq=gpt2_folder, dtype="float64")
    for seed in range(6):
        randomize(model, seed)
        config = GenerationConfig(max_new_tokens=30, ret_first=True, max_retrievals=2)
        ids, generated, *_ = plain_decode(model, passages, config, "A question beyond the window?")
        generator = Generator(model, retrieve_from(model, passages), config)
        answer, fed = fed_tokens(model, lambda: generator.generate("A question beyond the window?"))  # noqa: B023
        assert fed == ids


HEADS = [("phi", {}), ("granite", {"logits_scaling": 8.0}), ("gemma3_text", {"final_logit_softcapping": 3.0})]


@pytest.mark.parametrize(("kind", "options"), HEADS, ids=[kind for kind, _ in HEADS])
@torch.no_grad()
def test_tokens_are_chosen_from_the_logits_of_the_model(make_model, make_folder, corpus, monkeypatch, kind, options):
    model = make_model(gen=make_folder(kind, head_dim=8, **options), shared=True)
    steps: list[torch.Tensor] = []

    def record(logits, config, random):
        steps.append(logits)
        return choose(logits, config, random)

    monkeypatch.setattr("cosup_fast.generation.choose", record)
    config = GenerationConfig(ret_first=True, max_new_tokens=8, max_retrievals=1)
    generator = Generator(model, lambda query, k: [(corpus["go"], 0.0)], config)
    _, fed = fed_tokens(model, lambda: generator.generate("?"))
    expected = model.gen(torch.tensor([fed])).logits[0][-len(steps) :]
    assert len(steps) > 2
    for ours, theirs in zip(steps, expected, strict=True):
        allowed = ours > -torch.inf
        torch.testing.assert_close(ours[allowed], theirs[allowed], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("instruction", ["", "Answer in full. "])
def test_query_is_that_of_an_output_that_begins_with_a_retrieval(model, passages, instruction):
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


def sampled(model, corpus, **config) -> Answer:
    config = GenerationConfig(ret_first=True, max_new_tokens=20, **config)
    return Generator(model, lambda query, k: [(corpus["go"], 0.0)], config).generate("?")


def test_a_seed_gives_the_same_answer(model, corpus):
    first = sampled(model, corpus, temperature=1.0, seed=3)
    torch.manual_seed(99)
    assert sampled(model, corpus, temperature=1.0, seed=3) == first
    assert len({sampled(model, corpus, temperature=1.0, seed=seed).text for seed in range(6)}) == 6
    greedy = sampled(model, corpus)
    assert sampled(model, corpus, temperature=1e-300) == sampled(model, corpus, temperature=1.0, top_p=1e-9) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.4, 0.3, 0.2, 0.1, 0]),
        (0.5, 1.0, [16 / 30, 9 / 30, 4 / 30, 1 / 30, 0]),
        (2.0, 1.0, [2.0, 3**0.5, 2**0.5, 1, 0]),
        (1.0, 0.75, [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (1.0, 0.69, [4 / 7, 3 / 7, 0, 0, 0]),
        (1.0, 0.1, [1, 0, 0, 0, 0]),
    ],
)
def test_sampled_frequencies(temperature, top_p, expected):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).log()[[3, 0, 4, 2, 1]]
    expected = torch.tensor(expected)[[3, 0, 4, 2, 1]]
    random = torch.Generator().manual_seed(0)
    config = GenerationConfig(temperature=temperature, top_p=top_p)
    counts = Counter(choose(logits, config, random) for _ in range(4000))
    assert {token for token in range(5) if expected[token] > 0} == set(counts)
    kept = sorted(counts)
    share = (expected[kept] / expected.sum()).double().numpy()
    if len(kept) > 1:
        observed = [counts[token] for token in kept]
        assert stats.chisquare(observed, share / share.sum() * sum(observed)).pvalue > 0.001


def test_top_p_stops_as_soon_as_it_is_reached():
    random = torch.Generator().manual_seed(0)
    config = GenerationConfig(temperature=1.0, top_p=0.5)
    assert {choose(torch.zeros(4), config, random) for _ in range(100)} == {0, 1}


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
