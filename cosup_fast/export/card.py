"""A model card: the README.md of an exported model, with what is known of its run and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from huggingface_hub import ModelCardData

from cosup_fast.data.prepared.catalog import CATALOG

if TYPE_CHECKING:
    from cosup_fast.config.model import NSPConfig
    from cosup_fast.data.template import TextConfig


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says about a checkpoint.

    Args:
        name: a title for the model.
        licence: an identifier as Hugging Face knows them, such as `apache-2.0`; None where it is not known.
        config: the configuration of the run.
        step: of the checkpoint.
        held_out: the last held-out figures up to that step.
    """

    name: str = "A co-supervised model"
    licence: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    held_out: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Path, *, name: str | None = None, licence: str | None = None) -> Self:
        """What the folder of a checkpoint's run records; only a name where there is no run."""
        from cosup_fast.config import load_config
        from cosup_fast.training.checkpoint import chosen_checkpoint, step_of
        from cosup_fast.training.log import read_metrics

        checkpoint = chosen_checkpoint(checkpoint)
        run = checkpoint.parent.parent
        if not (run / "config.yaml").is_file() or not (checkpoint / "trainer.json").is_file():
            return cls(name=name or checkpoint.name, licence=licence)
        config = load_config(run / "config.yaml").model_dump(mode="json")
        step = step_of(checkpoint)
        figures = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "held-out" and r["step"] <= step]
        return cls(name or run.name, licence, config, step, figures[-1] if figures else {})


def model_card(kind: str, text: TextConfig, nsp: NSPConfig, facts: RunFacts) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        kind: what was exported; see `export`.
        text: the template.
        nsp: the geometry of the sequence space.
        facts: of the run.
    """
    template = resources.files("cosup_fast.export").joinpath("cards", f"{kind}.md").read_text(encoding="utf-8")
    return "\n".join([_front_matter(kind, facts), template.format(**_fields(text, nsp, facts)), _run(facts)])


def _front_matter(kind: str, facts: RunFacts) -> str:
    models = facts.config.get("model", {})
    gen, embseq = models.get("gen"), models.get("embseq") or models.get("gen")
    bases = {"retriever": [gen, embseq], "query": [gen], "embseq": [embseq], "gen": [gen]}[kind]
    known = [base for base in dict.fromkeys(bases) if base]
    licence = facts.licence or next((_licence(base) for base in known if _licence(base)), None)
    front = ModelCardData(
        base_model=known or None,
        library_name="transformers" if kind == "gen" else "sentence-transformers",
        license=(licence or "other").lower(),
        license_name=None if licence else "unknown",
        pipeline_tag="text-generation" if kind == "gen" else "sentence-similarity",
        tags=["cosup-fast", "retrieval", *([] if kind == "gen" else ["sentence-transformers"])],
    )
    return f"---\n{front.to_yaml()}\n---\n"


def _licence(name: str) -> str | None:
    """The licence of a prepared set or model, when it is one identifier."""
    entry = CATALOG.get(name.split("/")[0])
    return entry.licence if entry is not None and " " not in entry.licence else None


def _fields(text: TextConfig, nsp: NSPConfig, facts: RunFacts) -> dict[str, str]:
    measure = "inner product of unit vectors" if nsp.unit else "inner product, not normalised"
    return {
        "name": facts.name,
        "passage": text.passage.replace("\n", "\\n"),
        "prompt": text.prompt.replace("\n", "\\n"),
        "limit": str(text.max_passage_tokens),
        "measure": measure,
    }


def _run(facts: RunFacts) -> str:
    lines = ["## The run", ""]
    if not facts.config:
        return "\n".join([*lines, "Nothing was recorded about it.", ""])
    data = facts.config.get("data", {})
    lines += [
        f"- steps: {facts.step}",
        f"- passages: {_source(data['corpus'])}",
        f"- trained on: {'; '.join(map(_source, data['train'])) or 'nothing'}",
        f"- held out: {'; '.join(map(_source, data['dev'])) or 'nothing'}",
        "",
    ]
    if facts.held_out:
        step, pool = facts.held_out["step"], data["dev_pool"]
        lines += [f"Held-out figures after step {step}; retrieval among {pool} passages, or all gold ones if more:", ""]
        lines += ["| measure | value |", "|---|---:|"]
        lines += [f"| {name} | {x:.4g} |" for name, x in facts.held_out.items() if isinstance(x, float)]
    else:
        lines += ["No held-out figures were recorded."]
    config = yaml.safe_dump(dict(facts.config), sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, "", "Its configuration:", "", "```yaml", config.rstrip(), "```", ""])


def _source(name: str) -> str:
    entry = CATALOG.get(name.split("/")[0])
    return f"{name} ({entry.licence})" if entry else name
