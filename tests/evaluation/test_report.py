"""The HTML report: it shows what it must, marks answers, and other people's text stays text."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from cosup_fast.data.records import Example, Passage
from cosup_fast.evaluation.comparison import compare
from cosup_fast.evaluation.html import render
from cosup_fast.evaluation.judge import Verdict
from cosup_fast.evaluation.report import QuestionRecord, Report, figure, shown
from cosup_fast.evaluation.scoring import score
from cosup_fast.evaluation.suites import METRICS, suite_of

EVIL = "<script>alert('x')</script> & \"quotes\" <b>bold {{ 7*7 }} </textarea>"


def make_report(answer_of, name="co-supervised", correct=(True, False, True), domain="", **settings) -> Report:
    """Three questions of two data sets; the second one is full of markup."""
    passages = {
        "paris": Passage(id="paris", title="Paris", text=f"{EVIL} Paris, the capital; paris again."),
        EVIL: Passage(id=EVIL, title=EVIL, text="Nothing here."),
    }
    records = []
    for number, right in enumerate(correct):
        dataset = ("nq", "mine", "nq")[number]
        example = Example(
            id=f"q{number}", dataset=dataset, question=f"{EVIL}?" if number == 1 else "Capital of France?", output=[],
            answers=["Paris", f"{EVIL} not"], gold=["paris"],
        )  # fmt: skip
        passage = "paris" if right else EVIL
        answer = answer_of(("It is ", None), ("Paris." if right else "Rome <i>!", passage), retrieved=(passage,))
        verdicts = [Verdict(entailed=right, score=float(right), why=f"because {EVIL}")]
        suite = suite_of(dataset)
        records.append(
            QuestionRecord(
                key=f"{dataset}/q{number}", domain=domain, example=example, ranks=(1 if right else None,),
                answer=answer, evidence={passage: passages[passage]}, verdicts=tuple(verdicts),
                scores=score(example, answer, suite, passages, (), verdicts, 1.0 + number),
            )
        )  # fmt: skip
    settings = {
        "system": name, "checkpoint": "abc", "judge": "lexical", "fluency": None, "generation": {"seed": 0},
        "note": {"evil": EVIL}, **settings,
    }  # fmt: skip
    groups = {(record.example.dataset, domain): suite_of(record.example.dataset) for record in records}
    return Report.of(settings, records, groups)


class Page(HTMLParser):
    """Which elements a page has, the text in them, and what it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[tuple[str, str | None]] = []
        self.marked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [(name, value) for name, value in attrs if name in ("src", "href", "action") or name[:2] == "on"]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "mark":
            self.marked.append(data)
            self.tags.append("")


def test_other_peoples_text_is_escaped_and_nothing_is_loaded(answer_of):
    text = render(make_report(answer_of))
    page = Page(text)
    assert not {"script", "b", "i", "link", "img", "iframe", "textarea"} & set(page.tags)
    # Links load nothing until they are followed; each leads to the server's page with its question.
    assert [name for name, _ in page.loads if name != "href"] == []
    assert all(re.fullmatch(r"http://127\.0\.0\.1:8000/#question=[\w%./~&=-]+", value) for _, value in page.loads)
    assert len(page.loads) > 0
    assert "&lt;script&gt;" in text
    assert "49" not in re.sub(r"#\w+|[\d.]+rem", "", text.split("</style>")[1])  # {{ 7*7 }} is text
    assert "{{ 7*7 }}" in text
    assert "default-src 'none'" in text


def test_answers_are_marked_and_reasons_given(answer_of):
    text = render(make_report(answer_of))
    assert Page(text).marked.count("Paris") == 6  # of both right questions: answer, title and text
    assert "paris" in Page(text).marked
    plain = re.sub(r"<[^>]+>", " ", text)
    wanted = ["gold passage", "not a gold passage", "holds a gold answer", "no gold answer in it", "not entailed"]
    wanted += ["because", "ranked 1", "not among the first 100", "not correct", "retrieved", "3 questions"]
    for words in wanted:
        assert words in " ".join(plain.split()), words


def test_a_question_with_dozens_of_spellings_shows_some(answer_of):
    report = make_report(answer_of)
    answers = ["Paris", "paris!", "The Paris", *(f"Lutetia {n}" for n in range(9))]
    example = report.questions[0].example.model_copy(update={"answers": answers})
    question = report.questions[0].model_copy(update={"example": example})
    text = render(report.model_copy(update={"questions": (question,)}))
    assert "Paris · Lutetia 0 · " in text
    assert "Lutetia 6 <small>and 2 more in report.json</small>" in text
    assert "paris!" not in text


def test_tables_hold_the_numbers(answer_of):
    report = make_report(answer_of, domain="in-domain")
    text = render(report)
    for part in report.datasets:
        assert f"{100 * part.metrics['containment'].mean:.1f}" in text
        assert figure("perplexity", part.metrics["perplexity"].mean) in text
    metrics = {name for part in report.datasets for name in part.metrics if name in METRICS}
    assert text.count("<tr>") == 3 + len(report.datasets) + len(report.averages) + len(metrics)
    assert list(report.averages) == ["all", "in-domain"]


def test_numbers_are_short():
    assert [figure("perplexity", value) for value in (1.04, 999.94, 12345.6, 5540547.0)] == [
        "1.0", "999.9", "12,346", "5.5e+06",
    ]  # fmt: skip
    assert figure("recall@1", 0.12345) == "12.3"


def test_many_questions_are_cut_and_the_page_says_so(answer_of, monkeypatch):
    monkeypatch.setattr("cosup_fast.evaluation.html.SHOWN", 2)
    text = render(make_report(answer_of))
    assert text.count('<details class="q') == 2
    assert "The first 2 of 3; report.json has all." in text


def test_compare(answer_of):
    before = make_report(answer_of, "closed-book", (False, False, True))
    after = make_report(answer_of, "co-supervised", (True, True, True))
    compared = compare(before, after)
    rows = {(row.metric, row.dataset): row.gain for row in compared.metrics}
    assert (compared.before, compared.after, compared.questions) == ("closed-book", "co-supervised", 3)
    assert compared.differs == ()
    gain = rows["containment", ""]
    assert (gain.before, gain.after, gain.gain.mean) == pytest.approx((1 / 3, 1, 2 / 3))
    assert gain.p_value == pytest.approx(0.5)  # of 8 ways to swap, (+,+) and (-,-) are as far, each twice
    assert rows["containment", "nq"].gain.mean == 0.5
    assert rows["perplexity", ""].gain.mean == 1  # a ratio
    assert compare(after, before).metrics[0].gain.gain.mean == -compared.metrics[0].gain.gain.mean
    assert [row.metric for row in compare(before, after, ["grounded"]).metrics] == ["grounded"] * 3
    assert compare(before, make_report(answer_of, generation={"seed": 1})).differs == ("generation",)
    table = compared.table(datasets=True)
    assert table.row_count == len(compared.metrics) > compared.table().row_count


def test_compare_takes_only_questions_that_both_have(answer_of):
    before, after = make_report(answer_of), make_report(answer_of)
    part = before.model_copy(update={"questions": before.questions[1:]})
    compared = compare(part, after)
    assert (compared.questions, compared.left_out) == (2, 1)
    other = before.questions[0].example.model_copy(update={"question": "Another?"})
    changed = before.model_copy(update={"questions": (before.questions[0].model_copy(update={"example": other}),)})
    with pytest.raises(ValueError, match="no question in common between 1 before and 3 after"):
        compare(changed, after)
    with pytest.raises(ValueError, match="metric 'grounding' is unknown, did you mean 'grounded'"):
        compare(before, after, ["grounding"])


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_no_figure_is_cut_at_any_width(answer_of, width):
    before, after = make_report(answer_of, "closed-book [red]x", (False, False, True)), make_report(answer_of)
    console = Console(width=width, file=io.StringIO())
    console.print(before.table())
    text = console.file.getvalue()
    for part in before.datasets:
        for name in ("perplexity", "grounded", part.correctness):
            for line in shown(name, part.metrics.get(name)).split("\n"):
                assert line in text, (name, line)
    console.print(compare(before, after).table())
    text = console.file.getvalue()
    assert max(map(len, text.split("\n"))) <= width
    assert "closed-book [red]x" in text or width < 80  # markup is text; a name may wrap
    for row in compare(before, after).metrics:
        if not row.dataset and row.gain.p_value is not None:
            assert f"{row.gain.p_value:.4f}" in text
            assert figure(row.metric, row.gain.before) in text
            assert f"{row.gain.gain.mean:.2f}" in text or f"{100 * row.gain.gain.mean:+.2f}" in text


def test_a_report_without_its_settings_is_refused(answer_of, tmp_path):
    report = make_report(answer_of)
    report.model_copy(update={"settings": {"system": "x", "judge": None}}).save(tmp_path)
    with pytest.raises(ValueError, match="its settings lack checkpoint, fluency, generation"):
        Report.load(tmp_path)


def test_no_changed_byte_of_a_report_is_used(answer_of, tmp_path):
    report = make_report(answer_of, correct=(True,))
    report.save(tmp_path)
    assert Report.load(tmp_path) == report
    path = tmp_path / "report.json"
    whole = path.read_bytes()
    for place in {*range(0, len(whole), 5), *range(len(whole) - 24, len(whole))}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"report.json is not a report that can be read"):
            Report.load(path)


def test_a_report_without_a_checksum_is_read(answer_of, tmp_path):
    report = make_report(answer_of)
    path = tmp_path / "report.json"
    path.write_text(report.model_dump_json(indent=1))
    assert Report.load(path) == report
