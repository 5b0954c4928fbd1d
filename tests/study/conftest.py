"""A study of the tiny model: two conditions and their pair, two seeds, two sets."""

from __future__ import annotations

import pytest
import yaml

from cosup_fast.data.records import write_jsonl
from cosup_fast.study import load_study


@pytest.fixture(scope="session")
def make_study(passages, examples, llama_folder):
    """A function that writes the YAML of a small study into a folder; `changes` replace its sections."""

    def make(folder, **changes):
        for name, records in (("passages", passages), ("train", examples[:2]), ("dev", examples[2:])):
            write_jsonl(folder / f"{name}.jsonl", records)
        for name, chosen in (("cities", examples[:2]), ("dates", examples[2:3])):
            records = [e.model_copy(update={"gold": [s.passage for s in e.output if s.passage]}) for e in chosen]
            write_jsonl(folder / f"{name}.jsonl", records)
        study = {
            "output": str(folder / "results"),
            "work": str(folder / "work"),
            "base": {
                "model": {"gen": llama_folder},
                "data": {
                    "corpus": str(folder / "passages.jsonl"),
                    "train": [str(folder / "train.jsonl")],
                    "dev": [str(folder / "dev.jsonl")],
                },
                "training": {"batch_size": 2, "steps": 4, "eval_every": 2, "checkpoint_every": 1, "lr": 1e-2},
                "generation": {"ret_first": True, "max_retrievals": 1, "max_new_tokens": 6},
            },
            "sets": [
                {
                    "name": name,
                    "examples": str(folder / f"{name}.jsonl"),
                    "corpus": str(folder / "passages.jsonl"),
                    "domain": domain,
                }
                for name, domain in (("cities", "in-domain"), ("dates", "out-of-domain"))
            ],
            "seeds": [0, 1],
            "conditions": {
                "ntp": {"change": {"nsp.weight": 0}, "systems": ["gold", "closed-book"]},
                "nsp": {"change": {"ntp.weight": 0}, "systems": ["ranks"], "seeds": [0]},
                "both": {
                    "systems": ["gold", "co-supervised", "swapped", "replaced"],
                    "probes": ["attention", "spaces"],
                },
                "pair": {"pair": {"writer": "ntp", "retriever": "nsp"}, "seeds": [0]},
            },
            "main": "both/co-supervised",
            "decisive": [
                {"title": "write", "metric": "correctness", "after": "both/gold", "before": "ntp/gold"},
                {"title": "query", "metric": "recall@1", "after": "both/co-supervised", "before": "nsp/ranks"},
            ],
        }
        if "conditions" in changes:  # which the comparisons name
            del study["main"], study["decisive"]
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
        return path

    return make


@pytest.fixture
def write_study(make_study, tmp_path):
    """That function for a new folder."""
    return lambda **changes: make_study(tmp_path, **changes)


@pytest.fixture
def study(write_study):
    """The study itself."""
    return load_study(write_study())
