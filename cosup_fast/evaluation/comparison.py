"""Two evaluations on the same questions: what the second gains over the first, and whether that could be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cosup_fast.data.strict import Strict
from cosup_fast.evaluation.estimates import Estimate, Gain, compare_values
from cosup_fast.evaluation.report import Report, figure
from cosup_fast.evaluation.suites import METRICS, SUMMARY, check_metrics
from cosup_fast.terminal import FigureTable


class ComparedMetric(Strict):
    """One metric on the questions that both runs have it for."""

    metric: str
    dataset: str  # empty: all questions
    domain: str
    gain: Gain  # of perplexities: both geometric means, and their ratio as gain


class Comparison(Strict):
    """A paired comparison; differences of shares are after - before."""

    before: str
    after: str
    questions: int  # that both have
    left_out: int  # that only one has
    differs: tuple[str, ...]  # settings other than the system's own that are not alike
    metrics: tuple[ComparedMetric, ...]

    def table(self, *, datasets: bool = False) -> FigureTable:
        """Each metric of both runs with its gain and p-value; with `datasets`, for each data set too."""
        table = FigureTable(
            "metric", "questions", self.before, self.after, "gain, paired\n95% interval", "p",
            caption="percent (perplexity: ratio); two-sided paired permutation test, not corrected for many metrics",
        )  # fmt: skip
        for row in self.metrics:
            if row.dataset and not datasets:
                continue
            known = METRICS.get(row.metric)
            unit = known.unit if known else "share"
            scale, sign = {"share": (100, "+"), "count": (1, "+"), "geometric": (1, "")}[unit]
            title = known.title if known else SUMMARY[row.metric]
            gain = row.gain.gain
            interval = (
                "" if gain.low is None else f"\n[{scale * gain.low:{sign}.2f}, {scale * (gain.high or 0):{sign}.2f}]"
            )
            table.add_row(
                f"{title}\n{row.dataset} {row.domain}".strip(),
                str(gain.count),
                figure(row.metric, row.gain.before),
                figure(row.metric, row.gain.after),
                f"{scale * gain.mean:{sign}.2f}{interval}",
                "-" if row.gain.p_value is None else f"{row.gain.p_value:.4f}",
            )
        return table


def compare(before: Report, after: Report, metrics: Sequence[str] = ()) -> Comparison:
    """Compares two reports question by question.

    Args:
        before: the baseline.
        after: the run that may be better.
        metrics: which ones; all that both have when empty.

    Raises:
        ValueError: an unknown metric, or no question in common.
    """
    check_metrics([name for name in metrics if name not in SUMMARY])
    ours, theirs = ({record.key: record for record in report.questions} for report in (before, after))
    common = [key for key in ours if key in theirs and ours[key].example.question == theirs[key].example.question]
    if not common:
        raise ValueError(
            f"no question in common between {len(ours)} before and {len(theirs)} after: both must be evaluated on the "
            "same examples"
        )
    groups = [("", "", common)]
    for part in before.datasets:
        members = [k for k in common if (ours[k].example.dataset, ours[k].domain) == (part.dataset, part.domain)]
        if part.dataset and len(before.datasets) > 1:
            groups.append((part.dataset, part.domain, members))
    rows = []
    for name in metrics or [*METRICS, *(name for name in SUMMARY if name not in METRICS)]:
        values = before.values(name), after.values(name)
        for dataset, domain, members in groups:
            both = [key for key in members if key in values[0] and key in values[1]]
            if both:
                pair = [{key: side[key] for key in both} for side in values]
                rows.append(ComparedMetric(metric=name, dataset=dataset, domain=domain, gain=_gain(name, *pair)))
    return Comparison(
        before=before.settings["system"],
        after=after.settings["system"],
        questions=len(common),
        left_out=len(ours.keys() | theirs.keys()) - len(common),
        differs=tuple(
            name for name in ("generation", "judge", "fluency") if _decoding(before, name) != _decoding(after, name)
        ),
        metrics=tuple(rows),
    )


def _gain(metric: str, before: dict[str, float], after: dict[str, float]) -> Gain:
    if metric not in METRICS or METRICS[metric].unit != "geometric":
        return compare_values(before, after)
    logs = compare_values(*({key: math.log(value) for key, value in side.items()} for side in (before, after)))
    low, high = (None if x is None else math.exp(x) for x in (logs.gain.low, logs.gain.high))
    ratio = Estimate(mean=math.exp(logs.gain.mean), low=low, high=high, count=logs.gain.count)
    return Gain(before=math.exp(logs.before), after=math.exp(logs.after), gain=ratio, p_value=logs.p_value)


def _decoding(report: Report, name: str) -> object:
    value = report.settings[name]
    # A closed-book system cannot retrieve: that is what is compared.
    drop = ("max_retrievals", "ret_first")
    return {k: v for k, v in value.items() if k not in drop} if isinstance(value, dict) else value
