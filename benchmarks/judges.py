"""How well do the judges of grounding that need no NLI model separate VitaminC's labels?

    python benchmarks/judges.py --claims 500 --output FOLDER

A claim of VitaminC (Schuster et al. 2021), with the sentences of Wikipedia that decide it, counts as entailed where its
label is "true". The first half of the claims drawn fits the curve, the second half is what the table is of. AUC is the
probability that an entailed claim scores above another one; its interval is a bootstrap over claims.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from cosup_fast.data.records import Passage
from cosup_fast.data.sources import home
from cosup_fast.evaluation import LexicalJudge, LikelihoodJudge

Pair = tuple[Passage, str]
LABELS = ("True", "False", "Neither")


def read_claims(path: Path, count: int, seed: int = 0) -> list[tuple[Pair, str]]:
    """Claims with their evidence and label, drawn by the seed."""
    tasks = json.loads(path.read_text(encoding="utf-8"))["examples"]
    random.Random(seed).shuffle(tasks)
    found = []
    for number, task in enumerate(tasks[:count]):
        evidence, claim = task["input"].split("\nClaim: ")
        title, _, text = evidence.partition(": ")
        label = max(task["target_scores"], key=task["target_scores"].get)
        found.append(
            ((Passage(id=str(number), title=title.replace("_", " "), text=text.strip()), claim.strip()), label)
        )
    return found


def auc(scores: np.ndarray, entailed: np.ndarray) -> float:
    """The area under the ROC curve; ties count half."""
    ranks, positive = rankdata(scores), entailed.sum()
    return (ranks[entailed].sum() - positive * (positive + 1) / 2) / (positive * (len(entailed) - positive))


def interval(scores: np.ndarray, entailed: np.ndarray, resamples: int = 1000) -> tuple[float, float]:
    """The 95% bootstrap interval of the AUC."""
    draw = np.random.default_rng(0)
    drawn = (draw.integers(len(scores), size=len(scores)) for _ in range(resamples))
    low, high = np.percentile([auc(scores[rows], entailed[rows]) for rows in drawn], [2.5, 97.5])
    return float(low), float(high)


def fit(features: np.ndarray, entailed: np.ndarray) -> np.ndarray:
    """Slopes and offset of logistic regression, by maximum likelihood."""
    rows = np.column_stack([features, np.ones(len(features))])
    sign = np.where(entailed, 1.0, -1.0)
    return minimize(lambda weights: np.logaddexp(0, -sign * (rows @ weights)).sum(), np.zeros(rows.shape[1])).x


def in_parts(judge: Callable[[Sequence[Pair]], list[float]], pairs: Sequence[Pair], size: int = 50) -> np.ndarray:
    """The scores of all pairs, with a line of progress for each part."""
    scores: list[float] = []
    for start in range(0, len(pairs), size):
        scores += judge(pairs[start : start + size])
        print(f"{len(scores)} of {len(pairs)} claims", file=sys.stderr, flush=True)
    return np.array(scores)


def table(scores: dict[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """A row a judge: AUC of entailed claims against all others, against refuted and against undecided ones."""
    lines = ["| judge | AUC | 95% interval | against false | against neither |", "|---|---:|---:|---:|---:|"]
    entailed = labels == "True"
    for name, values in scores.items():
        low, high = interval(values, entailed)
        parts = [auc(values[rows], entailed[rows]) for other in LABELS[1:] for rows in [entailed | (labels == other)]]
        lines.append(
            f"| {name} | {auc(values, entailed):.3f} | {low:.3f} to {high:.3f} | {parts[0]:.3f} | {parts[1]:.3f} |"
        )
    return lines


def main() -> None:
    """Runs the judges and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", type=int, default=500)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    source = home() / "bigbench" / "vitaminc.json"
    if not source.is_file():
        parser.error(f"{source} is missing: cosup-fast data prepare bigbench")
    claims = read_claims(source, given.claims)
    pairs, labels = [pair for pair, _ in claims], np.array([label for _, label in claims])
    verdicts = LexicalJudge().judge(pairs)
    lexical = np.array([verdict.score + verdict.entailed for verdict in verdicts])
    removed = in_parts(LikelihoodJudge(given.model).surprise_removed, pairs)
    half = len(claims) // 2
    slope, offset = fit(removed[:half, None], labels[:half] == "True")
    both = np.column_stack([lexical, removed])
    weights = fit(both[:half], labels[:half] == "True")
    tested = labels[half:]
    scores = {
        "lexical": lexical[half:],
        f"likelihood:{given.model}": removed[half:],
        "both, by logistic regression": both[half:] @ weights[:-1],
    }
    accepted = np.array([verdict.entailed for verdict in verdicts])[half:]
    likely = slope * removed[half:] + offset > 0
    counts = ", ".join(f"{int((tested == label).sum())} {label.lower()}" for label in LABELS)
    right = [float((decided == (tested == "True")).mean()) for decided in (accepted, likely)]
    fitted = f"The curve was fitted on {half} others: slope {slope:.2f}, offset {offset:.2f}."
    lines = [
        f"{len(tested)} claims ({counts}). {fitted}",
        "",
        *table(scores, tested),
        "",
        f"Right by the verdict: lexical {100 * right[0]:.1f}% (it accepts {100 * accepted.mean():.1f}%), likelihood "
        f"{100 * right[1]:.1f}% (it accepts {100 * likely.mean():.1f}%).",
        "",
        f"`python {shlex.join(sys.argv)}`",
        "",
        machine.line(),
    ]
    print("\n".join(lines))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "README.md").write_text("# Judges of grounding on VitaminC\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
