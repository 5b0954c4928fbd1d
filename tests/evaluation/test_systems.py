"""What each system retrieves, and that all of them write alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosup_fast.cli.systems import open_system, output_folder
from cosup_fast.config import dump_config, load_config
from cosup_fast.data.passages import PassageFile
from cosup_fast.data.records import Example, Passage, Segment, write_jsonl
from cosup_fast.data.template import passage_text
from cosup_fast.evaluation import (
    DenseRetriever,
    GoldRetriever,
    IndexRetriever,
    PairRetriever,
    RandomRetriever,
    evaluate,
    load_test_sets,
)
from cosup_fast.evaluation.kinds import SYSTEMS, split_name, table
from cosup_fast.evaluation.ranks import asked, retrieval_ranks
from cosup_fast.evaluation.retrievers import Request
from cosup_fast.evaluation.systems import ScoredQuestion, Searches, System
from cosup_fast.generation import Answer, Decoder, GenerationConfig, Generator
from cosup_fast.index import SequenceIndex, embed_queries

CONFIG = GenerationConfig(ret_first=True, max_new_tokens=12, max_retrievals=2, candidates=3)


def answers_of(system: System, examples, config: GenerationConfig = CONFIG) -> list[Answer]:
    """The answers in the order of their examples."""
    rows: dict[int, Answer] = {}
    system.answer(examples, config, rows.__setitem__)
    assert sorted(rows) == list(range(len(examples)))
    return [rows[row] for row in range(len(examples))]


def ids(found) -> list[str]:
    return [passage.id for passage, _ in found]


def names(ranking) -> list[str]:
    return [name for name, _ in ranking]


def asked_once(retriever, request: Request, k: int) -> list[str]:
    (found,) = retriever.retrieve([request], k)
    return ids(found)


def request(example: Example, number: int = 0, *written: Segment) -> Request:
    return Request(example, torch.zeros(32), written, number)


def test_co_supervised_writes_what_the_generator_writes(system, model, index, examples):
    generator = Generator(model, index, CONFIG)
    expected = [generator.generate(example.question, example.instruction) for example in examples]
    for answer, one in zip(answers_of(system, examples), expected, strict=True):
        assert (answer.segments, answer.stop_reason) == (one.segments, one.stop_reason)
        for found, other in zip(answer.retrievals, one.retrievals, strict=True):
            assert [c.passage for c in found.candidates] == [c.passage for c in other.candidates]
            assert [c.score for c in found.candidates] == pytest.approx([c.score for c in other.candidates], abs=1e-5)


def test_ranked_lists_agree_with_the_ranks(system, model, index, examples):
    ranks = retrieval_ranks(model, examples, index)
    lists = system.retriever.rank(examples, 11)
    gold = [next(iter(wanted)) for example in examples for _, wanted in asked(example)]
    assert [names(ranked).index(name) for ranked, name in zip(lists, gold, strict=True)] == ranks
    assert system.retriever.rank([Example(id="s", question="?", output=[])], 5) == []


def test_a_corpus_in_files_is_not_read_into_memory(model, examples, tmp_path, monkeypatch):
    """Of an index in a folder, only the lines of what is ranked and of what Gen is given are read."""
    many = [Passage(id=f"p{n}", title=f"Passage {n}", text=f"{n} is a number.") for n in range(700)]
    index = SequenceIndex.build(model, many, tmp_path / "index", progress=False)
    questions = [e.model_copy(update={"output": [], "gold": [f"p{n}"]}) for n, e in enumerate(examples)]
    write_jsonl(tmp_path / "questions.jsonl", questions)
    lines: list[int] = []
    line = PassageFile.line
    monkeypatch.setattr(PassageFile, "line", lambda self, row: lines.append(row) or line(self, row))
    system = System("co-supervised", model, IndexRetriever(model, index))
    tests = load_test_sets([str(tmp_path / "questions.jsonl")], system.passages)
    report = evaluate(system, tests, CONFIG, progress=False)
    assert len(lines) <= len(examples) * (100 + 2 * CONFIG.max_retrievals * (CONFIG.candidates + 3))
    in_memory = IndexRetriever(model, SequenceIndex.build(model, many, progress=False))
    assert {**in_memory.origin, **in_memory.corpus.identity} == report.settings["retriever"]
    same = evaluate(System("co-supervised", model, in_memory), tests, CONFIG, progress=False)
    assert same.questions == report.questions
    assert dict(system.passages) == {passage.id: passage for passage in many}
    assert "p700" not in system.passages


def test_closed_book_never_retrieves(model, examples):
    closed = System("closed-book", model)
    for answer in answers_of(closed, examples):
        assert answer.retrievals == ()
        assert answer.inserted_tokens == 0
    report = evaluate(closed, examples, CONFIG, progress=False)
    assert not {"recall@1", "passage_f1", "answer_in_passage", "retrieval", "grounded"} & set(report.overall)
    assert report.settings["generation"]["max_retrievals"] == 0


def test_gold_hands_over_the_gold_passages_in_order(model, passages, examples):
    retriever = GoldRetriever(passages)
    assert [asked_once(retriever, request(examples[1], n), 5) for n in range(3)] == [["paris"], ["seine"], ["seine"]]
    answers = answers_of(System("gold", model, retriever), examples)
    for example, answer in zip(examples, answers, strict=True):
        assert answer.retrievals[0].best.passage == example.gold[0]
    report = evaluate(System("gold", model, retriever), examples, CONFIG, progress=False)
    assert "recall@1" not in report.overall  # nothing is searched
    assert report.overall["passage_precision"].mean == 1
    lost = Example(id="lost", question="?", output=[], gold=["atlantis"])
    with pytest.raises(ValueError, match=r"'lost' has no gold passage in the corpus, which --system gold hands over"):
        evaluate(System("gold", model, retriever), [examples[0], lost], CONFIG, progress=False)


def test_gold_pages_are_handed_over_by_their_first_paragraph():
    paragraphs = [Passage(id=f"{page}#{n}", title=page, text=f"{n}") for page in "ab" for n in range(2)]
    example = Example(id="x", question="?", output=[], gold=["b", "a#1", "a"])
    retriever = GoldRetriever(paragraphs)
    assert [asked_once(retriever, request(example, n), 1)[0] for n in range(3)] == ["a#1", "b#0", "a#0"]


def test_random_passages_depend_on_seed_question_and_number_alone(model, passages, examples):
    def drawn(seed):
        retriever = RandomRetriever(passages, seed)
        return [asked_once(retriever, request(e, n), 3) for e in examples for n in range(2)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({tuple(names) for names in drawn(0)}) > 4
    assert all(len(set(names)) == 3 for names in drawn(0))
    lists = RandomRetriever(passages).rank(examples, 100)
    assert [len(found) for found in lists] == [11] * 6
    firsts = [asked_once(RandomRetriever(passages, seed), request(examples[0]), 1)[0] for seed in range(300)]
    assert {firsts.count(passage.id) > 8 for passage in passages} == {True}  # 27 expected


def test_a_pair_retrieves_with_its_own_queries(make_model, model, passages, examples, corpus):
    other = make_model(seed=5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    index = SequenceIndex.build(other, passages, progress=False)
    retriever = PairRetriever(other, index)
    example = examples[1]
    queries, _ = embed_queries(other, [example], corpus)
    written = tuple(example.output[:3])
    expected = [ids(index.retrieve(query, 11)) for query in queries]
    assert asked_once(retriever, request(example), 11) != expected[0]  # before "First the city."
    assert asked_once(retriever, request(example, 0, example.output[0]), 11) == expected[0]
    assert asked_once(retriever, request(example, 1, *written), 11) == expected[1]
    system = System("pair:other", model, retriever)
    for example, answer in zip(examples, answers_of(system, examples), strict=True):
        assert [c.passage for c in answer.retrievals[0].candidates] == asked_once(retriever, request(example), 3)
    assert evaluate(system, examples, CONFIG, progress=False).settings["retriever"]["index"] == other.fingerprint()


def test_what_was_written_reaches_the_retriever(trained, passages, examples):
    steps = []

    class Recording(GoldRetriever):
        def retrieve(self, requests, k):
            steps.append(requests)
            return super().retrieve(requests, k)

    system = System("gold", trained, Recording(passages))
    answers = answers_of(system, examples, GenerationConfig())
    assert [answer.text for answer in answers] == ["".join(s.text for s in e.output) for e in examples]
    assert len(steps[0]) == 3  # all but e2 begin with [NSP]: they ask at once
    requests = sorted((r for step in steps for r in step), key=lambda r: (r.example.id, r.number))
    assert [(r.example.id, r.number) for r in requests] == [
        ("e1", 0), ("e2", 0), ("e2", 1), ("e3", 0), ("e4", 0), ("e4", 1),
    ]  # fmt: skip
    for request in requests:
        at = [i for i, segment in enumerate(request.example.output) if segment.passage is not None][request.number]
        assert request.written == tuple(request.example.output[:at])
    assert requests[0].query.shape == (32,)
    assert not torch.equal(requests[1].query, requests[2].query)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_every_baseline_answers_many_questions_at_once(make_model, model, passages, examples, encoder_folder, batch):
    other = make_model(seed=7)
    retrievers = {
        "closed-book": None,
        "gold": GoldRetriever(passages),
        "random": RandomRetriever(passages),
        "dense": DenseRetriever(encoder_folder, passages, "{title} :: {text}"),
        "pair": PairRetriever(other, SequenceIndex.build(other, passages, progress=False)),
    }
    many = [e.model_copy(update={"id": f"{e.id}-{n}"}) for n in range(2) for e in examples]
    config = CONFIG.model_copy(update={"ctx_truncate": True, "max_new_tokens": 20})
    for name, retriever in retrievers.items():
        rows: dict[int, Answer] = {}
        System(name, model, retriever).answer(many, config, rows.__setitem__, batch=batch)
        assert sorted(rows) == list(range(len(many)))
        for row, example in enumerate(many):
            (alone,) = answers_of(System(name, model, retriever), [example], config)
            assert rows[row].segments == alone.segments
            found, expected = ([[c.passage for c in r.candidates] for r in a.retrievals] for a in (rows[row], alone))
            assert found == expected


@pytest.fixture(scope="module")
def encoder_folder(make_folder, tmp_path_factory) -> str:
    """A random BERT as a sentence-transformers model."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = str(tmp_path_factory.mktemp("bert"))
    tokenizer = AutoTokenizer.from_pretrained(make_folder("llama"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    encoder = tmp_path_factory.mktemp("encoder")
    transformer = models.Transformer(folder)
    SentenceTransformer(modules=[transformer, models.Pooling(32)]).save(str(encoder))
    return str(encoder)


@pytest.mark.slow
def test_a_dense_retriever_fetches_no_binary(encoder_folder, tmp_path):
    """bitsandbytes, which sentence-transformers brings along, asks the package `kernels` for one at its import."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    print('FETCHED')\n    raise ImportError\n")
    code = "import sys; from cosup_fast.evaluation.text_retrievers import sentence_encoder as e; e(sys.argv[1], 'cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code, encoder_folder], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, "FETCHED" in done.stdout) == (0, False), done.stderr
    assert "pip install kernels" not in done.stderr


def test_dense_searches_with_the_question_and_what_is_written(encoder_folder, passages, examples, model):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(encoder_folder)
    retriever = DenseRetriever(encoder_folder, passages, "{title} :: {text}")
    embeddings = encoder.encode(
        [passage_text("{title} :: {text}", p.title, p.text) for p in passages], normalize_embeddings=True
    )

    def expected(text):
        scores = embeddings @ encoder.encode([text], normalize_embeddings=True)[0]
        return [passages[i].id for i in sorted(range(len(passages)), key=lambda i: -scores[i])]

    example = examples[1]
    so_far = f"{example.question} First the city. Paris lies on the Seine. Then its length:"
    assert asked_once(retriever, request(example), 4) == expected(example.question)[:4]
    assert asked_once(retriever, request(example, 1, *example.output[:3]), 11) == expected(so_far)
    assert names(retriever.rank(examples, 11)[2]) == expected(so_far)
    system = System("dense:tiny", model, retriever)
    (answer,) = answers_of(system, [example])
    assert answer.retrievals[0].best.passage == expected(example.question)[0]
    with pytest.raises(ValueError, match="dense retriever"):
        DenseRetriever(str(encoder_folder) + "/1_Pooling", passages, "{text}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("golden", "--system 'golden' is unknown, did you mean 'gold'"),
        ("pair", "needs its RUN: write pair:RUN"),
        ("random:7", "random takes nothing after a colon"),
    ],
)
def test_systems_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        split_name(name)


def test_the_docs_and_the_help_list_every_system(cosup):
    assert table() in (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    _, text, _ = cosup("evaluate", "--help")
    assert all(kind.form in text for kind in SYSTEMS.values())


def test_names_of_systems(tmp_path, model, data_folder):
    assert split_name("dense") == (SYSTEMS["dense"], "minilm")
    assert split_name("pair:runs/a:b") == (SYSTEMS["pair"], "runs/a:b")
    folder = output_folder(None, tmp_path, "pair:runs/nsp only")
    assert folder == tmp_path / "evaluation" / "pair-nsp-only"
    for name in ("closed-book", "gold", "random"):
        corpus = None if name == "closed-book" else str(data_folder / "passages.jsonl")
        opened = open_system(name, tmp_path, lambda path: model, corpus=corpus, seed=3)
        assert opened.name == name
        assert len(opened.passages) == (0 if name == "closed-book" else 11)
    assert isinstance(opened.retriever, RandomRetriever)
    assert opened.retriever.origin["seed"] == 3
    (tmp_path / "index").mkdir()
    SequenceIndex.build(model, list(opened.passages.values()), progress=False).save(tmp_path / "index")
    assert isinstance(open_system("co-supervised", tmp_path, lambda path: model).retriever, IndexRetriever)
    paired = open_system(f"pair:{tmp_path}", tmp_path / "x", lambda path: model)
    assert isinstance(paired.retriever, PairRetriever)
    assert paired.sources["retriever"] == str(tmp_path)


def test_the_untrained_models_of_a_run_are_made_on_the_device(tmp_path, model, data_folder, monkeypatch):
    run = load_config(None, ["training.seed=5", f"data.corpus={data_folder / 'passages.jsonl'}"])
    (tmp_path / "config.yaml").write_text(dump_config(run))
    made = []
    monkeypatch.setattr("cosup_fast.training.initial.new_model", lambda *given: made.append(given) or model)
    opened = open_system("untrained", tmp_path, lambda path: pytest.fail("weights were read"), device="a device")
    assert made == [(run, "a device")]
    assert isinstance(opened.retriever, IndexRetriever)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gold", {"index": Path("i")}, "--system gold reads no index: leave out --index i"),
        ("closed-book", {"index": Path("i")}, "closed-book reads no index"),
        (
            "co-supervised",
            {"index": Path("i"), "corpus": "c"},
            "--index i holds its own passages: leave out --corpus c",
        ),
    ],
)
def test_what_a_system_does_not_read_is_refused(name, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_system(name, tmp_path, lambda path: pytest.fail("a model was loaded"), **given)


def test_a_passage_that_nothing_was_written_on_is_still_read(model, passages, examples):
    """[NSP] passage [Cs] [Ce] [NSP]: the grounded text between them is empty."""
    template, requests = model.template, []

    class Recording(GoldRetriever):
        def retrieve(self, asked, k):
            requests.extend(asked)
            return super().retrieve(asked, k)

    index = SequenceIndex.build(model, passages, progress=False)
    script = [template.nsp, template.context_end, template.nsp, template.context_end, template.eos]
    decoder = Decoder(model, Searches(Recording(passages)))
    decoder.submit(ScoredQuestion("?", example=examples[0], forced=dict(enumerate(script))))
    list(decoder.run())
    assert [[(s.text, s.passage) for s in r.written] for r in requests] == [[], [("", "paris")]]
    assert len(PairRetriever(model, index).retrieve(requests, 3)[1]) == 3
