"""The test sets of the study: what each is, how its questions are read, and the sample of it that every machine has.

A sample is at most 200 questions of a set; its corpus, of about 2,000 passages at most, holds all that answer one of
them and others of the same set. Both were drawn once (`scripts/sampling.py`) and are named by id in `benchmarks.tsv`.
Seven sets search the leads and share a corpus, `leads-2k`; the others bring their own.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cosup_fast.data.prepared import bigbench
from cosup_fast.data.prepared.questions import bare_title, decode_fever_title, page_id
from cosup_fast.data.prepared.splits import page_roles
from cosup_fast.data.prepared.words import occurs, tokens
from cosup_fast.data.records import Example, Passage, read_examples, read_passages, write_jsonl

TABLE = Path(__file__).with_name("benchmarks.tsv")
LEADS = "leads-2k"
Asked = tuple[str, Example, Passage]  # the group that a sample is balanced over, the question, its passage
Read = Callable[[Path], Iterable[Asked]]


@dataclass(frozen=True)
class Benchmark:
    """A test set, in the order of its source.

    Args:
        name: also the `dataset` of its examples.
        what: what is asked, in a line.
        domain: whether questions of the same kind are trained on.
        metric: its metric of correctness.
        title_answers: whether an answer may be its passage's title, which a model that copies titles gets right.
        own_corpus: whether it brings its passages, or searches the leads.
        licence: of questions and passages.
        source: whose work it is.
        read: its questions, of a home folder.
        after: the prepared sets that `read` needs.
    """

    name: str
    what: str
    domain: Literal["in-domain", "out-of-domain"]
    metric: Literal["containment", "label_accuracy"]
    title_answers: bool
    own_corpus: bool
    licence: str
    source: str
    read: Read
    after: tuple[str, ...] = ("wiki-leads", "cloze", "questions", "bigbench")

    @property
    def questions(self) -> str:
        """What `load_examples` takes."""
        return f"{self.name}/test"

    @property
    def corpus(self) -> str:
        """What `load_corpus` takes."""
        return self.name if self.own_corpus else LEADS


def read_table(path: Path = TABLE) -> dict[tuple[str, str], list[str]]:
    """The ids of the sample: (set, `question` or `passage`) -> ids."""
    ids: dict[tuple[str, str], list[str]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for name, kind, id in list(csv.reader(file, delimiter="\t"))[1:]:
            ids.setdefault((name, kind), []).append(id)
    return ids


def write_table(ids: Mapping[tuple[str, str], Iterable[str]], path: Path = TABLE) -> None:
    """Writes the ids of the sample."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("set", "kind", "id"))
        writer.writerows((name, kind, id) for (name, kind), all_ids in ids.items() for id in all_ids)


def build_benchmark(benchmark: Benchmark) -> Callable[[list[Path], Path, Path], None]:
    """How a test set is prepared.

    `test.jsonl` is the sample, `whole.jsonl` all that may be asked; `passages.jsonl` the sample's corpus,
    `passages-whole.jsonl` all passages, where they are more.
    """

    def build(packages: list[Path], home: Path, out: Path) -> None:
        table, trained = read_table(), trained_questions(home)
        sample, corpus = (set(table.get((benchmark.name, kind), ())) for kind in ("question", "passage"))
        examples: list[Example] = []
        passages: dict[str, Passage] = {}
        for _, example, passage in benchmark.read(home):
            passages[passage.id] = passage
            if tuple(tokens(example.question)) not in trained:
                examples.append(example)
        chosen = [example for example in examples if example.id in sample]
        assert {example.id for example in chosen} == sample, benchmark.name
        write_jsonl(out / "test.jsonl", chosen)
        if benchmark.own_corpus:
            write_jsonl(out / "whole.jsonl", examples)
            write_jsonl(out / "passages.jsonl", (p for p in passages.values() if not corpus or p.id in corpus))
            if corpus:
                write_jsonl(out / "passages-whole.jsonl", passages.values())

    return build


def build_shared_corpus(packages: list[Path], home: Path, out: Path) -> None:
    """Writes the leads that the test sets without passages of their own search."""
    chosen = set(read_table()[LEADS, "passage"])
    write_jsonl(out / "passages.jsonl", (lead for lead in _leads(home).values() if lead.id in chosen))


def build_fever_pages(packages: list[Path], home: Path, out: Path) -> None:
    """Writes which pages decide each claim of FEVER, as a human found them."""
    import io
    import zipfile

    with zipfile.ZipFile(packages[0]) as package:
        jar = package.read("pyserini/resources/jars/anserini-0.16.1-fatjar.jar")
    with zipfile.ZipFile(io.BytesIO(jar)) as archive:
        name = "qrels.beir-v1.0.0-fever.test.txt"
        (out / "qrels.txt").write_bytes(archive.read(f"topics-and-qrels/{name}"))


def trained_questions(home: Path) -> set[tuple[str, ...]]:
    """The words of every question that trains or tunes, other than those made of leads' own sentences."""
    files = [home / name / f"{split}.jsonl" for name in ("cloze", "questions") for split in ("train", "dev")]
    return {tuple(tokens(example.question)) for file in files for example in read_examples(file, None)}


def _leads(home: Path) -> dict[str, Passage]:
    return {passage.id: passage for passage in read_passages(home / "wiki-leads" / "passages.jsonl")}


def _asked(name: str, file: str, *datasets: str) -> Read:
    """Questions of the prepared `questions`."""

    def read(home: Path) -> Iterator[Asked]:
        leads = _leads(home)
        for example in read_examples(home / "questions" / f"{file}.jsonl", leads):
            if example.dataset in datasets:
                yield example.dataset, example.model_copy(update={"dataset": name}), leads[example.gold[0]]

    return read


def _own(read: Callable[..., Iterator[bigbench.Pair]], file: str, *arguments: bool) -> Read:
    """Questions of a file of the archive, with passages of their own."""

    def asked(home: Path) -> Iterator[Asked]:
        for example, passage in read(home / "bigbench" / file, *arguments):
            yield example.answers[0] if example.instruction else "", example, passage

    return asked


def _fever(home: Path) -> Iterator[Asked]:
    """Claims about a lead of the test that decides them; no lead that trains or tunes does."""
    leads = _leads(home)
    roles = page_roles(leads.values())
    pages: dict[str, list[str]] = {}
    for line in (home / "fever-pages" / "qrels.txt").read_text(encoding="utf-8").splitlines():
        claim, _, page, _ = line.split()
        pages.setdefault(claim, []).append(page_id(decode_fever_title(page)))
    gold = {
        claim: [leads[page] for page in named if page in leads]
        for claim, named in pages.items()
        if all(roles.get(page, "test") == "test" for page in named)
    }
    for example, passage in bigbench.read_fever(home / "bigbench" / "fever.json", gold):
        if occurs(tokens(bare_title(passage.title)), tokens(example.question)):
            yield example.answers[0], example, passage


def _wikidata(home: Path) -> Iterator[Asked]:
    """Facts whose subject is a lead of the test, in turn of every relation."""
    leads = _leads(home)
    roles = page_roles(leads.values())
    tested = {id: lead for id, lead in leads.items() if roles[id] == "test"}
    yield from bigbench.read_wikidata(home / "bigbench" / "wikidata.json", tested)


_CANARY = "its file in BIG-bench asks never to be trained on"
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "nq", "questions of Natural Questions about leads of the test", "in-domain", "containment", True, False,
            "CC BY-SA 3.0", "Kwiatkowski et al. 2019", _asked("nq", "test-in", "nq"),
        ),
        Benchmark(
            "triviaqa", "questions of TriviaQA about leads of the test", "in-domain", "containment", True, False,
            "questions without a licence of their own, leads CC BY-SA 4.0", "Joshi et al. 2017",
            _asked("triviaqa", "test-in", "triviaqa"),
        ),
        Benchmark(
            "new-topics", "questions of both about Arts and Physical sciences, topics never trained on",
            "out-of-domain", "containment", True, False, "as nq and triviaqa", "as nq and triviaqa",
            _asked("new-topics", "test-out", "nq", "triviaqa"),
        ),
        Benchmark(
            "webquestions", "questions of WebQuestions about leads", "out-of-domain", "containment", True, False,
            "CC BY 4.0", "Berant et al. 2013", _asked("webquestions", "test-out", "webquestions"),
        ),
        Benchmark(
            "curatedtrec", "questions of CuratedTREC about leads; answers are regular expressions", "out-of-domain",
            "containment", True, False, "questions without a licence of their own, leads CC BY-SA 4.0",
            "Baudiš and Šedivý 2015", _asked("curatedtrec", "test-out", "curatedtrec"),
        ),
        Benchmark(
            "fever", "claims about leads, true or false", "out-of-domain", "label_accuracy", False, False,
            "CC BY-SA 3.0", f"Thorne et al. 2018; {_CANARY}", _fever,
            ("wiki-leads", "cloze", "questions", "bigbench", "fever-pages"),
        ),
        Benchmark(
            "wikidata", "facts about leads, of many relations: The capital of X is", "out-of-domain", "containment",
            False, False, "CC0 (facts), leads CC BY-SA 4.0", f"Wikidata; {_CANARY}", _wikidata,
        ),
        Benchmark(
            "squad", "SQuAD 1.1 dev, paragraphs of 48 articles", "out-of-domain", "containment", True, True,
            "CC BY-SA 4.0", f"Rajpurkar et al. 2016; {_CANARY}", _own(bigbench.read_squad, "squad.json", True),
        ),
        Benchmark(
            "new-wiki", "SquadShifts: paragraphs of other articles of Wikipedia", "out-of-domain", "containment", True,
            True, "CC BY 4.0 (questions), CC BY-SA 3.0 (text)", f"Miller et al. 2020; {_CANARY}",
            _own(bigbench.read_squad, "new-wiki.json", True),
        ),
        Benchmark(
            "nyt", "SquadShifts: articles of the New York Times, without titles", "out-of-domain", "containment", False,
            True, "CC BY 4.0 (questions); the text is the newspaper's", f"Miller et al. 2020; {_CANARY}",
            _own(bigbench.read_squad, "nyt.json", False),
        ),
        Benchmark(
            "reddit", "SquadShifts: posts of Reddit, without titles", "out-of-domain", "containment", False, True,
            "CC BY 4.0 (questions); the text is its authors'", f"Miller et al. 2020; {_CANARY}",
            _own(bigbench.read_squad, "reddit.json", False),
        ),
        Benchmark(
            "nq-restored", "Natural Questions with its own paragraphs, without titles", "out-of-domain", "containment",
            False, True, "CC BY-SA 3.0", f"Kwiatkowski et al. 2019, Longpre et al. 2021; {_CANARY}",
            _own(bigbench.read_nq, "nq-substituted.json", True),
        ),
        Benchmark(
            "nq-substituted", "the same questions, the answer in each paragraph replaced by another entity",
            "out-of-domain", "containment", False, True, "CC BY-SA 3.0", f"Longpre et al. 2021; {_CANARY}",
            _own(bigbench.read_nq, "nq-substituted.json", False),
        ),
        Benchmark(
            "quoref", "questions that need coreference in a paragraph, without titles", "out-of-domain", "containment",
            False, True, "CC BY 4.0", f"Dasigi et al. 2019; {_CANARY}", _own(bigbench.read_quoref, "quoref.json"),
        ),
        Benchmark(
            "vitaminc", "claims about a sentence of Wikipedia, true or false", "out-of-domain", "label_accuracy", False,
            True, "CC BY-SA 3.0", f"Schuster et al. 2021; {_CANARY}", _own(bigbench.read_vitaminc, "vitaminc.json"),
        ),
    )
}  # fmt: skip
"""By name, those in domain first."""
