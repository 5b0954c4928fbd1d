"""The client of docs/serving.md, against a server with a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def test_the_client_of_the_page_reads_an_answer_with_its_search_results(server, monkeypatch, capsys):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000" in block
    names: dict[str, object] = {}
    exec(compile(block.replace("http://127.0.0.1:8000", server.url), PAGE.name, "exec"), names)
    assert isinstance(names["text"], str)
    assert len(capsys.readouterr().out.splitlines()) >= 1
