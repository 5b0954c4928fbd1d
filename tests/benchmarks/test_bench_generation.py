"""The benchmark of generation on a tiny model: every case runs, the decoders write the same, and the table says so."""

import json
from dataclasses import asdict

import pytest

from benchmarks.generation import CASES, OURS, PLAIN, Result, describe, measure


@pytest.mark.parametrize("name", ["batch-16-truncated", "batch-1"])
def test_a_case(llama_folder, data_folder, name):
    said = []
    result = measure(name, 2, said.append, gen=llama_folder, corpus=str(data_folder / "passages.jsonl"))
    case, tokens = CASES[name], result.tokens
    assert result.same_text
    assert tokens["generated"] == case.requests * case.generated
    assert (tokens["read again"] > 0) == case.truncate
    assert result.processed[OURS] == sum(tokens.values()) - case.requests
    assert result.processed[PLAIN] > sum(tokens.values()) - tokens["read again"]  # all again after each retrieval
    assert all(len(seconds) == 2 for seconds in result.seconds.values())
    assert len(said) == 2 * len(case.contenders)
    assert Result(**json.loads(json.dumps(asdict(result)))) == result
    text = describe([result])
    assert f"| {name} | {OURS} |" in text
    assert "All decoders wrote the same text." in text
