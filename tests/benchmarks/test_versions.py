"""Two versions of the step take turns, on the same examples and weights."""

from __future__ import annotations

from typing import ClassVar

import pytest

from benchmarks import machine, versions
from benchmarks.versions import Setting, measure, versions_report


class Fake:
    """A worker whose losses and times depend on the folder's name."""

    turns: ClassVar[list[tuple[str, int, str, bool]]] = []

    def __init__(self, folder, setting):
        self.folder = folder

    def step(self, number, precision, *, learn):
        self.turns.append((self.folder, number, precision, learn))
        seconds = 3.0 if self.folder == "old" else 2.0
        off = {"old": 0.0, "new": 1e-6, "wrong": 1e-3}[self.folder]
        return {"seconds": seconds, "processor": 2 * seconds, "ntp": 2.0 * (1 + off), "nsp": 3.0}

    def close(self):
        self.turns.append((self.folder, -1, "closed", False))


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.setattr(versions, "Worker", Fake)
    monkeypatch.setattr(Fake, "turns", [])
    return Fake.turns


def test_versions_take_turns_and_the_first_step_is_not_counted(turns):
    found = measure(Setting(), ["old", "new"], 2, lambda text: None)
    assert [(name, number) for name, number, _, learn in turns if learn] == [
        ("old", 0), ("new", 0), ("new", 1), ("old", 1), ("old", 2), ("new", 2)
    ]  # fmt: skip
    assert [len(rounds) for rounds in found] == [2, 2]
    text = versions_report(found, Setting(), "ntp", "command")
    assert "| seconds | 1.50 | 1.50 to 1.50 | 1.50 1.50 |" in text
    assert [name for name, *_, what, _ in turns if what == "closed"] == ["old", "new"]


def test_other_losses_are_not_timed(turns):
    with pytest.raises(ValueError, match=r"ntp is 2.0 in old, 2.002 in wrong"):
        measure(Setting(), ["old", "wrong"], 2, lambda text: None)
    assert not any(learn for *_, learn in turns)
    assert len([turn for turn in turns if turn[2] == "closed"]) == 2


@pytest.mark.slow
def test_a_version_against_itself(llama_folder, data_folder):
    corpus, examples = str(data_folder / "passages.jsonl"), str(data_folder / "examples.jsonl")
    setting = Setting(model=llama_folder, embseq_layers=1, corpus=corpus, examples=[examples], batch_size=2, threads=1)
    first, second = measure(setting, [machine.ROOT, machine.ROOT], 1, lambda text: None)
    assert first[0]["ntp"] == second[0]["ntp"]
    assert first[0]["processor"] > 0
