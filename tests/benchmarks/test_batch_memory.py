"""The memory of a step with a large NSP batch, from a process of its own."""

from __future__ import annotations

import csv

import pytest

from benchmarks import batch_memory, cli


def test_a_row_is_a_real_step(llama_folder, data_folder):
    corpus, examples = str(data_folder / "passages.jsonl"), str(data_folder / "examples.jsonl")
    setting = batch_memory.Setting(
        model=llama_folder, corpus=corpus, examples=[examples], tokens_per_micro_batch=250, threads=1
    )
    row = batch_memory.here(setting, 4)
    assert (row.size, row.queries, row.passages) == (4, 6, 4)
    assert row.micro_batches > 2  # one each is the least
    assert row.nsp > 0
    assert row.peak_bytes > 50 << 20
    assert batch_memory.here(setting, 3).queries < 6  # and not those of an epoch cut in halves
    with pytest.raises(ValueError, match="size=5: there are 4 examples in"):
        batch_memory.here(setting, 5)


@pytest.mark.slow
def test_the_command_writes_a_folder_and_keeps_a_limit(llama_folder, data_folder, tmp_path, capsys):
    arguments = ["batch-memory", "--size", "2", "--size", "4", "--model", llama_folder, "--corpus",
                 str(data_folder / "passages.jsonl"), "--examples", str(data_folder / "examples.jsonl"),
                 "--tokens-per-micro-batch", "250", "--threads", "1", "--output", str(tmp_path / "x")]  # fmt: skip
    cli.app([*arguments, "--limit-gib", "8"], standalone_mode=False)
    with (tmp_path / "x" / "sizes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["size"] for row in rows] == ["2", "4"]
    with pytest.raises(ValueError, match=r"the peak is .*, above --limit-gib 0.01"):
        cli.app([*arguments, "--overwrite", "--limit-gib", "0.01"], standalone_mode=False)
    assert (tmp_path / "x" / "README.md").is_file()
