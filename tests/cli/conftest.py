"""What tests of commands that train share."""

import pytest


@pytest.fixture
def fields(llama_folder, data_folder, tmp_path):
    """Overrides of a tiny run, as a dict."""
    return {
        "output": tmp_path / "run",
        "model.gen": llama_folder,
        "data.corpus": data_folder / "passages.jsonl",
        "data.train": f"[{data_folder / 'examples.jsonl'}]",
        "data.dev": "[]",
        "training.batch_size": 2,
        "training.lr": 0.01,
        "training.steps": 4,
    }


@pytest.fixture
def arguments(fields):
    """A function that writes the fields, and changes of them, as overrides on the command line."""

    def arguments(**changes):
        return [f"{name}={value}" for name, value in {**fields, **changes}.items()]

    return arguments
