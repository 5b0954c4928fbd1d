"""The benchmark of host time: its table, and calls that cannot creep up."""

import re
import sys

import pytest

from benchmarks import cli, host, timing
from benchmarks.cases import LOSSES


def test_the_table_has_a_ratio_for_each_loss(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "SHORTEST", 1e-4)
    arguments = ["host", "--rounds", "2", "--output", str(tmp_path / "host")]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert not stop.value.code
    text = (tmp_path / "host" / "README.md").read_text()
    assert text.strip() in capsys.readouterr().out
    for loss in LOSSES:
        assert re.search(rf"^\| {loss} \| \d+ \| \d+ \| \d+\.\d\d \(.+\) \| \d+ \| \d+ \|$", text, re.M)


def test_a_step_enters_the_same_number_of_functions_each_time():
    costs = [host.measure("info-nce", rounds=1).calls for _ in range(2)]
    assert costs[0] == costs[1]
    assert costs[0][host.OURS] > costs[0][host.DENSE]
