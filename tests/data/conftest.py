"""What tests of data share."""

import json

import pytest


@pytest.fixture(scope="session")
def write_lines():
    """A function that writes JSON lines and returns their path."""

    def write(path, records):
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return path

    return write
