"""Which similarity, lambda and learning rate? Short runs that differ in one field each, compared on held-out questions.

    python benchmarks/pilot.py --output runs/pilot            # every setting, then the table
    python benchmarks/pilot.py --output runs/pilot --table    # the table of what is there

Unless its name says otherwise, a setting trains for the same number of steps from the same weights, on the same
batches in the same order, so a noisy machine changes its time and not its figures. A setting that has finished is not
run again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

from rich.console import Console

from cosup_fast.config import load_config
from cosup_fast.files import replace_file
from cosup_fast.training.log import read_metrics
from cosup_fast.training.run import run_training

# Gen is whole, because lambda and the learning rate are about what happens to a pretrained LM; Embseq is cut to its
# first six layers to keep a setting at a few minutes on two cores.
BASE = [
    "model.embseq_layers=6",
    "text.max_passage_tokens=48",
    "text.long_passages=truncate",
    "data.dev=[questions/dev, cloze/dev]",
    "data.dev_limit=120",
    "data.dev_pool=800",
    "training.batch_size=32",
    "training.warmup=0.1",
    "training.schedule=linear",
    "training.precision=bfloat16",
    "training.checkpoint_every=null",
]
WIDTH = 576
CENTRE = {"nsp.similarity": "cosine", "nsp.temperature": 0.05, "nsp.weight": 1.0, "training.lr": 3e-4}
SETTINGS: dict[str, dict[str, object]] = {
    "centre: cosine, tau 0.05, lambda 1, lr 3e-4": {},
    "lr 1e-3": {"training.lr": 1e-3},
    "raw dot, lambda 0.01 (paper)": {"nsp.similarity": "dot", "nsp.temperature": 1.0, "nsp.weight": 0.01},
    "dot / sqrt(D)": {"nsp.similarity": "dot", "nsp.temperature": math.sqrt(WIDTH)},
    "batch 16, 48 steps, constant lr": {
        "training.batch_size": 16,
        "training.steps": 48,
        "training.schedule": "constant",
    },
    "lambda 10": {"nsp.weight": 10.0},
    "lambda 0.1": {"nsp.weight": 0.1},
    "cosine, tau 0.02": {"nsp.temperature": 0.02},
    "lr 1e-4": {"training.lr": 1e-4},
    "seed 1": {"training.seed": 1},
    "raw dot": {"nsp.similarity": "dot", "nsp.temperature": 1.0},
    "cosine, tau 0.1": {"nsp.temperature": 0.1},
    "lambda 0.01": {"nsp.weight": 0.01},
}


def run_setting(output: Path, name: str, fields: dict[str, object], steps: int) -> None:
    """Trains one setting unless its figures are there."""
    folder = output / name.replace(" ", "_").replace("/", "over").replace(",", "").replace(":", "")
    if (folder / "done.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    overrides = {**CENTRE, "training.steps": steps, **fields, "output": str(folder)}
    overrides["training.eval_every"] = overrides["training.steps"]
    config = load_config(None, [*BASE, *(f"{key}={json.dumps(value)}" for key, value in overrides.items())])
    run_training(config, console=Console(stderr=True))
    records = read_metrics(folder / "metrics.jsonl")
    before, after = (next(r for r in order if r["kind"] == "held-out") for order in (records, records[::-1]))
    shutil.rmtree(folder / "checkpoints")
    warnings = folder / "warnings.log"
    done = {
        "name": name,
        "before": before,
        "after": after,
        "warnings": warnings.read_text().splitlines() if warnings.is_file() else [],
    }
    with replace_file(folder / "done.json") as file:
        file.write(json.dumps(done, indent=1) + "\n")


def table(output: Path) -> str:
    """What was seen, as Markdown, best R@5 first."""
    done = [json.loads(path.read_text()) for path in output.glob("*/done.json")]
    lines = ["| setting | steps | NTP | NSP | R@1 | R@5 | R@20 |", "|---|---|---|---|---|---|---|"]
    if done:
        before = done[0]["before"]
        done.append({"name": "before training", "after": before})
    for run in sorted(done, key=lambda run: -run["after"]["recall_at_5"]):
        after = run["after"]
        recalls = " | ".join(f"{after[f'recall_at_{k}']:.1%}" for k in (1, 5, 20))
        lines.append(f"| {run['name']} | {after['step']} | {after['ntp']:.3f} | {after['nsp']:.3f} | {recalls} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the settings one after the other and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/pilot"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", help="run the settings whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        for name, fields in SETTINGS.items():
            if arguments.only and arguments.only not in name:
                continue
            run_setting(arguments.output, name, fields, arguments.steps)
    print(table(arguments.output))


if __name__ == "__main__":
    main()
