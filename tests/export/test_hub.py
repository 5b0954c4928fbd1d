"""Exports on the hub: the real client speaks to a stand-in of the hub's HTTP API, which keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from cosup_fast.export.hub import push
from cosup_fast.export.sentence_transformers import export

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Repositories, each with the files of its last commit; files of safetensors travel as large ones (LFS)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self):
        hub, body = self.server, self.body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                self.answer({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
                return
            hub.repositories[name], hub.visibility[name] = {}, asked.get("visibility")
            self.answer({"url": f"{hub.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self.answer({"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}} for o in wanted]
            self.answer({"transfer": "basic", "objects": upload})
        elif self.path.endswith("/commit/main"):
            self.commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self.answer({"error": self.path}, 404)

    def commit(self, name: str, body: bytes):
        hub = self.server
        for line in body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                hub.messages.append(value["summary"])
            elif part["key"] == "file":
                hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            else:
                content = hub.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                hub.repositories[name][value["path"]] = content
        self.answer({"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # what HF_ENDPOINT sets
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_is_pushed_as_it_is(hub, cosup, make_model, tmp_path):
    make_model().save(tmp_path / "checkpoint")
    command = ("export", tmp_path / "checkpoint", tmp_path / "out", "--license", "apache-2.0")
    status, out, err = cosup(*command, "--push", "someone/finder", "--private")
    assert (status, f"pushed: {hub.url}/someone/finder" in out) == (0, True), err
    assert hub.repositories == {"someone/finder": _files(tmp_path / "out")}
    assert hub.visibility == {"someone/finder": "private"}
    assert hub.messages == ["cosup-fast export: retriever"]
    status, _, err = cosup(*command, "--push", "someone/finder", "--name", "Finder 2")
    assert status == 0, err
    assert hub.repositories["someone/finder"] == _files(tmp_path / "out")
    assert b"Finder 2" in hub.repositories["someone/finder"]["README.md"]


def test_nothing_else_of_a_folder_is_pushed(hub, make_model, tmp_path):
    export(make_model(), tmp_path / "out", "gen")
    written = _files(tmp_path / "out")
    (tmp_path / "out" / ".DS_Store").write_text("x")
    push(tmp_path / "out", "someone/gen")
    assert hub.repositories["someone/gen"] == written
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other is not an export, it has no export\.json"):
        push(tmp_path / "other", "someone/gen")


def test_what_cannot_be_pushed_is_said(hub, cosup, make_model, tmp_path, monkeypatch):
    make_model().save(tmp_path / "checkpoint")
    command = ("export", tmp_path / "checkpoint", tmp_path / "out")
    for arguments, message in [
        (("--push", "finder"), "--push finder: expected owner/name"),
        (("--push", "a/b/c"), "--push a/b/c: "),
        (("--private",), "name one with --push OWNER/NAME"),
    ]:
        status, _, err = cosup(*command, *arguments)
        assert (status, message in err) == (1, True), err
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        status, _, err = cosup(*command, "--push", "someone/finder")
    assert (status, "hf auth login, or set HF_TOKEN" in err) == (1, True), err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "another")
    status, _, err = cosup(*command, "--push", "someone/finder")
    assert (status, "is written, but could not be pushed to someone/finder: " in err, "401" in err) == (
        1,
        True,
        True,
    ), err
    assert (tmp_path / "out" / "export.json").is_file()
    assert hub.repositories == {}
