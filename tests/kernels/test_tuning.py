"""Launch configurations: what ships, and the search with real files, real clocks and real processes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from dataclasses import asdict

import pytest
import torch

from cosup_fast.kernels import tuning
from cosup_fast.kernels.tuning import Configuration, choose, nearest, target_of

CPU = torch.device("cpu")
SLOW, QUICK, QUICKEST, BROKEN = (Configuration({"BM": bm}, num_warps=4, num_stages=2) for bm in (64, 32, 16, 8))
SHIPPED = {"interpreter": SLOW}
SECONDS = {SLOW: 0.006, QUICK: 0.003, QUICKEST: 0.001}


class Launch:
    """A kernel whose configurations take the time that `SECONDS` says; others do not compile."""

    def __init__(self):
        self.launched: list[Configuration] = []

    def __call__(self, configuration: Configuration) -> None:
        self.launched.append(configuration)
        time.sleep(SECONDS[configuration])


def pick(launch, *, kernel="k", dtype=torch.bfloat16, sizes=(100, 64), candidates=(QUICK, QUICKEST, BROKEN), **options):
    shipped = options.pop("shipped", SHIPPED)
    return choose(kernel, dtype, sizes, shipped, candidates, launch, CPU)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and a search that is on."""
    monkeypatch.setenv("COSUP_AUTOTUNE", "1")
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "autotune"
    forget()


def forget() -> None:
    """What a new process starts with."""
    tuning.known_winners.clear()


def only_file(folder):
    (file,) = folder.iterdir()
    return file


def test_a_configuration_is_a_value():
    a, b = Configuration({"BM": 1, "BN": 2}, 4, 3), Configuration({"BN": 2, "BM": 1}, 4, 3)
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, Configuration({"BM": 1, "BN": 2}, 8, 3)}) == 2
    assert Configuration(**json.loads(json.dumps(asdict(a)))) == a == pickle.loads(pickle.dumps(a))
    assert a.kwargs == {"BM": 1, "BN": 2, "num_warps": 4, "num_stages": 3}
    sizes = {"BM": 1}
    c = Configuration(sizes)
    sizes["BM"] = 2
    assert c.constexprs == {"BM": 1}


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ],
    ids=str,
)
def test_the_nearest_target(capability, target):
    assert nearest(capability) == target


def test_targets_of_devices():
    assert target_of(CPU) == target_of(torch.device("meta")) == "interpreter"
    if torch.cuda.is_available():
        assert target_of(torch.device("cuda")) in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_a_search_the_shipped_one_runs(value, folder, monkeypatch):
    monkeypatch.delenv("COSUP_AUTOTUNE") if value is None else monkeypatch.setenv("COSUP_AUTOTUNE", value)
    launch = Launch()
    assert pick(launch) is SLOW
    assert launch.launched == []
    assert not folder.exists()


@pytest.mark.parametrize("value", ["2", "true", " 1"])
def test_another_value_is_an_error(value, folder, monkeypatch):
    monkeypatch.setenv("COSUP_AUTOTUNE", value)
    with pytest.raises(ValueError, match=f"COSUP_AUTOTUNE is '{value}'; set 1"):
        pick(Launch())


def test_the_fastest_wins_and_is_kept(folder):
    launch = Launch()
    assert pick(launch) == QUICKEST
    assert set(launch.launched) == {SLOW, QUICK, QUICKEST, BROKEN}
    assert launch.launched.count(BROKEN) == 1
    stored = json.loads(only_file(folder).read_text())
    assert stored["key"]["sizes"] == [128, 64]
    assert [t["constexprs"]["BM"] for t in stored["timings"]] == [16, 32, 64]

    again = Launch()
    assert pick(again) == QUICKEST  # from memory
    forget()
    assert pick(again) == QUICKEST  # from the file
    assert again.launched == []


def test_the_shipped_one_can_win(folder):
    assert pick(Launch(), shipped={"interpreter": QUICKEST}, candidates=[SLOW, QUICK]) == QUICKEST


def test_sizes_of_a_bucket_share_a_search(folder):
    pick(Launch(), sizes=(65, 64))
    within, beyond = Launch(), Launch()
    assert pick(within, sizes=(128, 33)) == QUICKEST
    assert within.launched == []
    pick(beyond, sizes=(129, 64))
    assert beyond.launched
    pick(Launch(), sizes=(0, 1))
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    "other",
    [{"kernel": "another"}, {"dtype": torch.float32}, {"candidates": (QUICK,)}, {"shipped": {"interpreter": QUICK}}],
    ids=lambda o: next(iter(o)),
)
def test_another_search_has_another_file(other, folder):
    pick(Launch())
    launch = Launch()
    pick(launch, **other)
    assert launch.launched
    assert len(list(folder.iterdir())) == 2


def damage(text: str) -> dict[str, bytes]:
    stored = json.loads(text)
    foreign = {**stored, "key": {**stored["key"], "device": "another"}}
    unknown = {**stored, "winner": asdict(BROKEN) | {"num_warps": 16}}
    return {
        "empty": b"",
        "torn": text[: len(text) // 2].encode(),
        "no text": bytes(range(256)),
        "a list": b"[1]",
        "foreign": json.dumps(foreign).encode(),
        "unknown winner": json.dumps(unknown).encode(),
        "other fields": json.dumps({**stored, "winner": {"BM": 3}}).encode(),
    }


@pytest.mark.parametrize("kind", ["empty", "torn", "no text", "a list", "foreign", "unknown winner", "other fields"])
def test_a_damaged_file_is_searched_again(kind, folder):
    pick(Launch())
    file = only_file(folder)
    file.write_bytes(damage(file.read_text())[kind])
    forget()
    launch = Launch()
    with pytest.warns(UserWarning, match=file.name):
        assert pick(launch) == QUICKEST
    assert launch.launched
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(None) == QUICKEST


def test_a_cache_that_cannot_be_written_is_a_warning(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be written"):
        assert pick(Launch()) == QUICKEST
    assert pick(None) == QUICKEST


def test_where_nothing_runs_the_shipped_one_is_left_to_fail(folder):
    assert pick(Launch(), shipped={"interpreter": BROKEN}, candidates=()) is BROKEN
    assert not folder.exists()


def test_nothing_is_timed_while_a_graph_is_captured(folder, monkeypatch):
    launch = Launch()
    with monkeypatch.context() as capturing:
        capturing.setattr(tuning, "capturing", lambda device: True)
        assert pick(launch) is SLOW
        assert launch.launched == []
    pick(launch)
    forget()
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert pick(None) == QUICKEST


WRITER = """
import sys, time, torch
from cosup_fast.kernels.tuning import Configuration, choose

a, b = Configuration({"BM": 1}), Configuration({"BM": 2})
for size in range(8):
    slow = a if size % 2 else b
    def launch(c):
        time.sleep(0.004 if c == slow else 0)
    print(choose("k", torch.float32, (2**size,), {"interpreter": a}, [b], launch, torch.device("cpu")).constexprs["BM"])
"""


def test_processes_that_write_at_once(folder, tmp_path):
    environment = os.environ | {"COSUP_AUTOTUNE": "1", "COSUP_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", WRITER]
    writers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for writer in writers:
        out, err = writer.communicate(timeout=300)
        assert writer.returncode == 0, err
        assert out.split() == ["1", "2"] * 4
    files = list(folder.iterdir())
    assert len(files) == 8
    assert all(json.loads(file.read_text())["winner"] for file in files)


def test_whether_a_graph_is_captured_is_torchs_word(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.capturing(torch.device("cuda"))
    assert not tuning.capturing(torch.device("cpu"))
