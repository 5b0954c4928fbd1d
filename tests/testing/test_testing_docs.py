"""The page about testing without a GPU: its snippets run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing-without-a-gpu.md"


@pytest.mark.skipif(not PAGE.exists(), reason="needs a source tree")
def test_the_snippets_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) > 8
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(blocks))
    command = [sys.executable, "-W", "ignore::pytest.PytestUnknownMarkWarning", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (promised,) = re.findall(r"^# (bounds: .*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert promised.partition(" (snippets")[0] in done.stdout
