"""The benchmark of the server with a tiny model: every row is measured, and those that are counts hold."""

import re

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


def test_a_small_run(ascii_folder, data_folder, capsys, tmp_path):
    from benchmarks.serving import main

    corpus, output = data_folder / "passages.jsonl", tmp_path / "results"
    small = ["--gen", ascii_folder, "--corpus", str(corpus), "--tokens", "40", "--crowd", "100", "--rounds", "1"]
    main([*small, "--output", str(output)])
    text = capsys.readouterr().out
    assert (output / "serving.md").read_text() == text
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.M))
    assert rows["the same text as offline, greedy"] == "yes"
    assert rows["50 clients that vanish: places free afterwards"] == "16 of 16"
    statuses = {int(code): int(n) for n, code in re.findall(r"(\d+) x (\d+)", rows["100 clients at once, by status"])}
    assert set(statuses) <= {200, 429}
    assert sum(statuses.values()) == 100
    for name in (
        "throughput of 16 clients / of the offline batch of 16",
        "first text beside 15 others, less alone, in steps",
    ):
        assert re.fullmatch(r"-?\d+\.\d\d \(.+\)", rows[name])
    assert float(rows["forwards of those clients / of the offline batch"].split()[0]) > 0.8
