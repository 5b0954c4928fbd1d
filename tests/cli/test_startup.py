"""What a command imports, which decides how soon it answers."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {
    "transformers",
    "sentence_transformers",
    "datasets",
    "faiss",
    "peft",
    "bitsandbytes",
    "torchao",
    "scipy",
    "triton",
}
CODE = """
import sys
from cosup_fast.cli.app import run

sys.argv = ["cosup-fast", "env"]
try:
    run()
except SystemExit as ended:
    assert not ended.code
print("LOADED", *sys.modules)
"""


def test_env_answers_without_importing_what_it_lists():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    table, loaded = done.stdout.split("LOADED")
    assert "sentence-transformers" in table
    assert not HEAVY & set(loaded.split())
