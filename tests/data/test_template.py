import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.data.template import (
    DESCRIPTIONS,
    IGNORE,
    Template,
    TextConfig,
    add_special_tokens,
    gap,
    passage_text,
)

WRITTEN_OUT = "[NSP] and [Cs], [Ce], [PAD], <s>, </s>"


@pytest.fixture(scope="module")
def template(model) -> Template:
    return model.template


def ids_of(template: Template, text: str) -> list[int]:
    return template.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def spelled(template: Template, example: Example, corpus: dict[str, Passage]) -> list[tuple[str, int]]:
    """The sequence of an example as (part, token), written from the format's definition."""
    parts = [
        ("prompt", t) for t in ids_of(template, f"{example.instruction}## Input:\n\n{example.question}## Output:\n\n")
    ]
    written = ""
    for segment in example.output:
        text = gap(written, segment.text) + segment.text
        written = text or written
        if segment.passage is None:
            parts += [("free", t) for t in ids_of(template, text)]
            continue
        passage = corpus[segment.passage]
        parts += [("nsp", template.nsp)]
        parts += [
            ("passage", t) for t in ids_of(template, passage_text("{title} :: {text}", passage.title, passage.text))
        ]
        parts += [("cs", template.context_start)]
        parts += [("grounded", t) for t in ids_of(template, text)]
        parts += [("ce", template.context_end)]
    return [*parts, ("end", template.eos)]


def labels_of(parts: list[tuple[str, int]], without: set[str]) -> list[int]:
    return [IGNORE if part in without else token for part, token in parts[1:]] + [IGNORE]


segments = st.builds(
    Segment,
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip),
    passage=st.none() | st.sampled_from(["paris", "short", "marks", "emoji", "go"]),
)


@given(output=st.lists(segments, max_size=5), question=st.text(st.characters(codec="utf-8"), max_size=20))
@settings(max_examples=60, deadline=None)
def test_sequence_and_labels_follow_the_format(model, corpus, output, question):
    example = Example(id="x", question=question + "?", output=output)
    template = model.template
    sequence = template.gen_sequence(example, corpus)
    parts = spelled(template, example, corpus)
    assert sequence.input_ids == [token for _, token in parts]
    assert sequence.labels == labels_of(parts, {"prompt", "passage", "cs"})
    assert sequence.query_rows == [row for row, (part, _) in enumerate(parts) if part == "nsp"]
    assert sequence.query_passages == [segment.passage for segment in output if segment.passage is not None]


def test_gold_alone_is_one_query_where_the_output_begins(template, corpus):
    """A question and its passage, as MS MARCO and converted KILT files have them: nothing follows the query."""
    sequence = template.gen_sequence(Example(id="x", question="Where?", output=[], gold=["rome", "paris"]), corpus)
    assert sequence.input_ids == [*template.prompt("Where?"), template.nsp]
    assert sequence.query_rows == [len(sequence.input_ids) - 1]
    assert sequence.query_passages == ["rome"]
    assert [label for label in sequence.labels if label != IGNORE] == [template.nsp]


def test_free_text_with_gold_is_grounded_on_it_as_a_whole(template, corpus):
    texts = [Segment(text="It is "), Segment(text="Rome.")]
    sequence = template.gen_sequence(Example(id="x", question="Where?", output=texts, gold=["rome"]), corpus)
    passage = ids_of(template, f"{corpus['rome'].title} :: {corpus['rome'].text}")
    written = [*ids_of(template, "It is "), *ids_of(template, "Rome."), template.context_end, template.eos]
    asked = [*template.prompt("Where?"), template.nsp]
    assert sequence.input_ids == [*asked, *passage, template.context_start, *written]
    assert [label for label in sequence.labels if label != IGNORE] == [template.nsp, *written]
    assert sequence.query_rows == [len(asked) - 1]


def test_a_grounded_output_asks_for_what_it_cites_whatever_its_gold(template, corpus):
    cited = [Segment(text="It is "), Segment(text="Rome.", passage="rome")]
    plain, gold = (Example(id="x", question="?", output=cited, gold=names) for names in ([], ["paris"]))
    assert template.gen_sequence(gold, corpus) == template.gen_sequence(plain, corpus)
    unknown = Example(id="x", question="?", output=[Segment(text="Rome.")], gold=["nowhere"])
    assert template.gen_sequence(unknown, corpus).query_rows == []


def test_text_between_passages_keeps_its_labels(template, examples, corpus):
    two = examples[1]
    sequence = template.gen_sequence(two, corpus)
    learned = template.tokenizer.decode([label for label in sequence.labels if label != IGNORE])
    assert learned == (
        "First the city. [NSP]Paris lies on the Seine. [Ce]Then its length: [NSP]777 km[Ce], that is all.</s>"
    )


def test_label_passages_labels_them_too(model, examples, corpus):
    labelled = Template(model.template.config.model_copy(update={"label_passages": True}), model.template.tokenizer)
    for example in examples:
        parts = spelled(labelled, example, corpus)
        assert labelled.gen_sequence(example, corpus).labels == labels_of(parts, {"prompt"})


@pytest.mark.parametrize("where", ["question", "instruction", "passage", "title", "free", "grounded"])
def test_the_text_of_a_special_token_stays_text(template, where):
    text = dict.fromkeys(("question", "instruction", "passage", "title", "free", "grounded"), "plain")
    text[where] = WRITTEN_OUT
    passage = Passage(id="p", title=text["title"], text=text["passage"])
    example = Example(
        id="x",
        question=text["question"],
        instruction=text["instruction"],
        output=[Segment(text=text["free"]), Segment(text=text["grounded"], passage="p")],
    )
    ids = template.gen_sequence(example, {"p": passage}).input_ids
    special = {template.nsp, template.context_start, template.context_end, template.pad, template.eos}
    special.add(template.tokenizer.bos_token_id)
    found = [token for token in ids if token in special]
    assert found == [template.nsp, template.context_start, template.context_end, template.eos]
    assert WRITTEN_OUT in template.decode(ids)
    assert set(template.sequence(passage)[:-1]).isdisjoint(special)


def test_sequence_is_what_is_inserted_and_ends_with_its_only_end(template, passages):
    for passage in passages:
        sequence = template.sequence(passage)
        assert sequence == [*template.inserted_passage(passage), template.eos]
        assert sequence.count(template.eos) == 1
        assert template.decode(sequence) == passage_text("{title} :: {text}", passage.title, passage.text)


def test_another_tokenizer_brings_its_own_start_and_end(make_model, gpt2_folder, passages):
    template = make_model(embseq=gpt2_folder).template
    own = template.embseq_tokenizer
    for passage in passages:
        sequence = template.sequence(passage)
        assert sequence[0] == own.bos_token_id
        assert sequence[-1] == own.eos_token_id
        assert own.decode(sequence[1:-1]) == passage_text("{title} :: {text}", passage.title, passage.text)


def test_generator_that_starts_with_a_token_does_so_once(make_model, gpt2_folder, examples, corpus):
    template = make_model(gen=gpt2_folder).template
    ids = template.gen_sequence(examples[1], corpus).input_ids
    assert ids[0] == template.tokenizer.bos_token_id
    assert ids.count(template.tokenizer.bos_token_id) == 1


def test_braces_in_text_are_not_fields(template, corpus):
    text = template.decode(template.prompt("{instruction} {0} }{", "{question}"))
    assert text == "{question}## Input:\n\n{instruction} {0} }{## Output:\n\n"
    assert template.decode(template.inserted_passage(corpus["braces"])) == (
        "{title} :: Braces {question} {0} and 100% stay as they are."
    )


def test_padding_is_no_end(template):
    assert template.pad != template.eos
    assert len({template.nsp, template.context_start, template.context_end, template.pad, template.eos}) == 5


def test_missing_special_tokens(model, llama_folder):
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(llama_folder)
    with pytest.raises(ValueError, match=r"lacks the special tokens \[NSP\], \[Cs\], \[Ce\], \[PAD\]"):
        Template(TextConfig(), plain)
    assert add_special_tokens(plain) == len(DESCRIPTIONS)
    assert add_special_tokens(plain) == 0
    Template(TextConfig(), plain)
    plain.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Template(TextConfig(), plain)


def test_unknown_passage(template, corpus):
    example = Example(id="e9", question="?", output=[Segment(text="a", passage="nowhere")])
    with pytest.raises(ValueError, match=r"'e9'.*unknown passage id 'nowhere'"):
        template.gen_sequence(example, corpus)


def test_long_passage_is_refused_or_cut(model, corpus):
    tokenizer, long = model.template.tokenizer, corpus["long"]
    with pytest.raises(ValueError, match=r"'long' has \d+ tokens.*max_passage_tokens=20.*long_passages=truncate"):
        Template(TextConfig(max_passage_tokens=20), tokenizer).sequence(long)
    cut = Template(TextConfig(max_passage_tokens=20, long_passages="truncate"), tokenizer)
    whole = model.template.sequence(long)
    assert cut.inserted_passage(long) == whole[:20]
    assert cut.sequence(long) == [*whole[:20], cut.eos]
    assert cut.sequence(corpus["short"]) == model.template.sequence(corpus["short"])


def test_what_exceeds_the_positions_is_refused(model, corpus, examples):
    tokenizer = model.template.tokenizer
    length = len(model.template.gen_sequence(examples[0], corpus).input_ids)
    Template(TextConfig(), tokenizer, max_length=length).gen_sequence(examples[0], corpus)
    with pytest.raises(ValueError, match=rf"'e1' has {length} tokens, more than the {length - 1} positions of Gen"):
        Template(TextConfig(), tokenizer, max_length=length - 1).gen_sequence(examples[0], corpus)
    with pytest.raises(ValueError, match=r"'long' has \d+ tokens, more than the 9 positions of Embseq"):
        Template(TextConfig(), tokenizer, embseq_max_length=9).sequence(corpus["long"])
    whole = model.template.sequence(corpus["long"])
    assert Template(TextConfig(), tokenizer, embseq_max_length=len(whole)).sequence(corpus["long"]) == whole


@pytest.mark.parametrize(
    "setting", [{"prompt": "{query}"}, {"prompt": "no field"}, {"passage": "{title}"}, {"passage": "{"}]
)
def test_wrong_templates_are_refused(setting):
    with pytest.raises(ValueError, match=f"text.{next(iter(setting))}"):
        TextConfig(**setting)


@pytest.mark.parametrize(
    ("before", "after", "between"),
    [
        ("on the Seine.", "It is old.", " "),
        ("on the Seine. ", "It is old.", ""),
        ("on the Seine.", "\nIt is old.", ""),
        ("Paris", ", which", ""),
        ("Paris (", "France", ""),
        ("巴黎。", "It", ""),
        ("", "It", ""),
        ("It", "", ""),
    ],
)
def test_segments_are_joined_by_a_space_where_neither_has_one(before, after, between):
    assert gap(before, after) == between


def test_outputs_are_written_with_the_spaces_that_their_segments_lack(template):
    passages = {"p": Passage(id="p", title="Paris", text="A city.")}
    output = [Segment(text="It lies on the Seine."), Segment(text="It is old.", passage="p"), Segment(text="Yes.")]
    spaced = [output[0], Segment(text=" It is old.", passage="p"), Segment(text=" Yes.")]
    made = [template.gen_sequence(Example(id="e", question="?", output=o), passages) for o in (output, spaced)]
    assert made[0].input_ids == made[1].input_ids


@pytest.mark.parametrize(
    ("template", "title", "text", "read"),
    [
        ("{title} :: {text}", "Paris", "A city.", "Paris :: A city."),
        ("{title} :: {text}", "", "A city.", "A city."),
        ("{title} :: {text}", "  ", " A city.\n", "A city."),
        ("{title} :: {text}", " Paris", "A city. ", "Paris :: A city."),
        ("{text} ({title})", "", "A city.", "A city."),
        ("Title: {title}\nText: {text}", "", "A city.", "A city."),
        ("# {title}\n{text}\n", "Paris", "A city.", "# Paris\nA city."),
        ("{text}", "", "A city.", "A city."),
        ("{text}", "Paris", "A city.", "A city."),
    ],
)
def test_a_passage_has_no_loose_ends(template, title, text, read):
    assert passage_text(template, title, text) == read
