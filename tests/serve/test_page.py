"""The page in a real browser: evidence before words, links both ways, stopping, comparing, keyboard, both schemes."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from cosup_fast.data.records import Passage
from cosup_fast.generation import Decoder, GenerationConfig, Generator
from cosup_fast.index import SequenceIndex

os.environ.setdefault("PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD", "1")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
MARKUP = "<img src=x onerror=document.title='owned'><b>bold</b>"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(serving, retriever, passages):
    """A server whose every passage holds markup, and that writes at a speed that can be watched."""
    marked = [Passage(id=p.id, title=f"{p.title} {MARKUP}", text=f"{MARKUP} {p.text}") for p in passages]
    index = SequenceIndex.build(retriever, marked, progress=False)
    config = GenerationConfig(max_new_tokens=60, candidates=3, ret_first=True)
    with serving(Generator(retriever, index, config), index) as running:
        yield running


@pytest.fixture
def page(browser, served):
    """A new page, which may ask this server alone."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.faults, page.elsewhere = [], []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda sent: page.elsewhere.append(sent.url) if not sent.url.startswith(served.url) else None)
    page.goto(served.url)
    loaded(page)
    yield page
    context.close()
    assert not page.faults
    assert not [url for url in page.elsewhere if not url.startswith(("blob:", "data:"))]


def loaded(page):
    # Not wait_for_function: it evaluates a string, which the page's policy forbids.
    page.wait_for_selector("#model option", state="attached")


def ask(page, question="Who?"):
    page.fill("#question", question)
    page.keyboard.press("Enter")


def done(page):
    playwright.expect(page.locator("#status")).to_have_text("Done.", timeout=60_000)


def test_evidence_is_there_before_the_words(page):
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const words = document.querySelector(".text"), cards = document.querySelectorAll(".passage");
            if (words) window.seen.push([cards.length, words.textContent.replace(/^[0-9]/, "").length]);
        }).observe(document.getElementById("answers"), { childList: true, subtree: true, characterData: true });
    }""")
    ask(page)
    done(page)
    seen = page.evaluate("window.seen")
    assert next(cards for cards, words in seen if words) > 0
    assert page.locator(".passage").count() == page.locator(".marker").count() > 0


def test_the_text_and_its_citations_are_those_of_the_api(page, served):
    ask(page)
    done(page)
    ask_api = {"model": "co-supervised", "messages": [{"role": "user", "content": "Who?"}]}
    reply = served.http.post("/v1/chat/completions", json=ask_api).json()
    message = reply["choices"][0]["message"]
    shown = page.evaluate("""() => {
        const copy = document.querySelector(".text").cloneNode(true);
        copy.querySelectorAll(".marker").forEach((marker) => marker.remove());
        return copy.textContent;
    }""")
    assert shown == message["content"]
    cited = [one["url_citation"] for one in message["annotations"]]
    assert len(cited) > 0
    expected = [message["content"][one["start_index"] : one["end_index"]] for one in cited]
    assert page.locator(".grounded").all_text_contents() == expected


def test_words_and_passages_are_linked_both_ways(page):
    ask(page)
    done(page)
    words, passage = page.locator(".grounded").first, page.locator(".passage").first
    words.click()
    number = words.get_attribute("data-retrieval")
    linked = page.locator(f"#a0-passage-{number}")
    assert "lit" in linked.get_attribute("class")
    assert page.evaluate("document.activeElement.id") == f"a0-passage-{number}"
    linked.press("Enter")
    assert page.evaluate("document.activeElement.className") == "grounded lit"
    page.locator(".marker").first.click()
    assert "lit" in passage.get_attribute("class")


def test_the_runners_up_open_by_keyboard_and_can_be_read(page):
    ask(page)
    done(page)
    opener, passage = page.locator(".passage summary").first, page.locator(".passage li p").first
    assert not passage.is_visible()
    opener.press("Enter")
    assert passage.is_visible()
    assert passage.text_content().startswith(MARKUP)
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "not led to the words"
    opener.click()
    assert not passage.is_visible()
    assert page.locator(".lit").count() == 0


def test_a_marker_keeps_the_focus_while_the_answer_grows(page, slow):
    page.click("#settings summary")
    page.fill("#max_tokens", "200")
    ask(page)
    marker = page.locator(".marker").first
    marker.focus()
    assert page.locator(".text").get_attribute("aria-busy") == "true"
    before = len(page.locator(".text").text_content())
    page.wait_for_timeout(50)
    for _ in range(100):
        if len(page.locator(".text").text_content()) > before + 3:
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("the answer does not grow")
    assert page.evaluate("document.activeElement.className") == "marker"
    page.focus("#stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Stopped.")
    assert page.locator(".text").get_attribute("aria-busy") == "false"
    assert page.evaluate("document.activeElement.id") == "question", "a disabled button cannot keep the focus"


def test_markup_is_shown_as_text(page):
    ask(page, MARKUP)
    done(page)
    assert MARKUP in page.locator(".passage p").first.text_content()
    assert page.locator(".passage img, .passage b, .text img").count() == 0
    assert page.title() == "cosup-fast"


@pytest.fixture
def slow(monkeypatch):
    """Steps that take a while: a tiny model would have ended before anyone could press a key."""
    step = Decoder.step

    def slowly(decoder):
        time.sleep(0.1)
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", slowly)


def test_a_stream_can_be_stopped(page, served, slow):
    page.click("#settings summary")
    page.fill("#max_tokens", "450")
    page.fill("#max_retrievals", "0")
    page.select_option("#ret_first", "false")
    ask(page)
    playwright.expect(page.locator(".text")).to_contain_text(re.compile("..."))
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped.")
    end = time.monotonic() + 20
    while served.engine.open:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_systems_are_compared(page):
    page.focus("#tab-ask")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-compare"
    assert page.locator("#other").input_value() == "closed-book"
    ask(page)
    done(page)
    assert page.locator("#answers h2").all_text_contents() == ["co-supervised", "closed-book"]
    assert page.locator("section[aria-label='closed-book'] .passage").count() == 0
    assert page.locator("section[aria-label='co-supervised'] .passage").count() > 0


def test_the_timeline_and_the_saved_record(page):
    ask(page)
    done(page)
    phases = page.locator(".spans li").all_text_contents()
    assert {"read", "retrieve", "write"} <= {phase.split()[0] for phase in phases}
    assert all(phase.endswith(" ms") for phase in phases)
    with page.expect_download() as download:
        page.click("#share")
    record = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert record["question"] == "Who?"
    assert record["answers"][0]["retrievals"][0][0]["snippet"].startswith(MARKUP)


def test_errors_are_said_in_words(page):
    ask(page, "long " * 600)
    page.wait_for_selector("[role=alert]")
    assert "positions of Gen" in page.locator("[role=alert]").text_content()
    page.faults = [fault for fault in page.faults if "400 (Bad Request)" not in fault]  # Chromium's own words


def test_a_question_comes_with_the_address(page, served):
    page.goto("about:blank")
    page.goto(f"{served.url}/#question=Which%20river%3F")
    assert page.locator("#question").input_value() == "Which river?"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(page, scheme):
    """axe-core finds nothing, in either colour scheme, with an answer on the page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.click("#settings summary")
    ask(page)
    done(page)
    found = axe.Axe().run(page).response["violations"]
    assert not found, [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]


@pytest.mark.slow
@pytest.mark.skipif("COSUP_SCREENSHOT_OF" not in os.environ, reason="COSUP_SCREENSHOT_OF names no server's address")
def test_the_picture_in_the_docs(browser):
    """Takes docs/images/serving.png of a server that has a trained model."""
    picture = Path(__file__).parents[2] / "docs" / "images" / "serving.png"
    context = browser.new_context(viewport={"width": 1100, "height": 620}, color_scheme="light")
    page = context.new_page()
    page.goto(os.environ["COSUP_SCREENSHOT_OF"])
    loaded(page)
    ask(page, os.environ.get("COSUP_SCREENSHOT_QUESTION", "Which river flows through Cairo?"))
    done(page)
    page.locator(".grounded").first.click()
    picture.parent.mkdir(exist_ok=True)
    page.screenshot(path=picture, full_page=True)
    context.close()
    assert picture.stat().st_size < 300_000
