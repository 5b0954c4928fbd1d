"""A model card: the README.md of an exported model, with what is known of its run and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from cosup_fast.data.prepared.catalog import CATALOG

if TYPE_CHECKING:
    from cosup_fast.config.model import NSPConfig
    from cosup_fast.data.template import TextConfig


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder tells of a checkpoint.

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
        """What stands in the folder of the run that a checkpoint is of; little where it is of none."""
        from cosup_fast.config import load_config
        from cosup_fast.training.checkpoint import chosen_checkpoint
        from cosup_fast.training.log import read_metrics

        checkpoint = chosen_checkpoint(checkpoint)
        run = checkpoint.parent.parent
        if not (run / "config.yaml").is_file():
            return cls(name=name or checkpoint.name, licence=licence)
        config = load_config(run / "config.yaml").model_dump(mode="json")
        step = int(checkpoint.name.rpartition("-")[2])
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
    return "\n".join([_front_matter(kind, facts), _USE[kind].format(**_fields(kind, text, nsp, facts)), _run(facts)])


def _front_matter(kind: str, facts: RunFacts) -> str:
    models = facts.config.get("model", {})
    gen, embseq = models.get("gen"), models.get("embseq") or models.get("gen")
    bases = {"retriever": [gen, embseq], "query": [gen], "embseq": [embseq], "gen": [gen]}[kind]
    known = [base for base in dict.fromkeys(bases) if base]
    licence = facts.licence or next((_licence(base) for base in known if _licence(base)), None)
    front: dict[str, Any] = {
        "license": (licence or "other").lower(),
        **({} if licence else {"license_name": "unknown"}),
        "library_name": "transformers" if kind == "gen" else "sentence-transformers",
        "pipeline_tag": "text-generation" if kind == "gen" else "sentence-similarity",
        **({"base_model": known} if known else {}),
        "tags": ["cosup-fast", "retrieval", *([] if kind == "gen" else ["sentence-transformers"])],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"


def _licence(name: str) -> str | None:
    """The licence of a prepared set or model, when it is one identifier."""
    entry = CATALOG.get(name.split("/")[0])
    return entry.licence if entry is not None and " " not in entry.licence else None


def _fields(kind: str, text: TextConfig, nsp: NSPConfig, facts: RunFacts) -> dict[str, str]:
    measure = "inner product of unit vectors" if nsp.similarity == "cosine" else "inner product, not normalised"
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
        return "\n".join([*lines, "Nothing is recorded of it.", ""])
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


_USE = {
    "retriever": """# {name}

Both sides of a model trained by semiparametric token-sequence co-supervision
([Lee et al., ACL 2024](https://arxiv.org/abs/2403.09024)): questions go to the generator (Gen), whose last hidden state
at `[NSP]` is the query, passages to the sequence encoder (Embseq), whose last hidden state at the end-of-sequence token
is the embedding. Scores: {measure}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this-folder")
queries = model.encode_query(["Who wrote Hamlet?"])
documents = model.encode_document(["Hamlet :: Hamlet is a tragedy by William Shakespeare."])
scores = queries @ documents.T
```

Documents were trained as `{passage}`, at most {limit} tokens; longer ones are cut. Give questions as they are: the
tokenizer puts them into `{prompt}` (without an instruction) and `[NSP]` behind.
""",
    "query": """# {name}

The queries' side of a model trained by semiparametric token-sequence co-supervision
([Lee et al., ACL 2024](https://arxiv.org/abs/2403.09024)): the generator's (Gen's) last hidden state at `[NSP]` behind
a question. Scores: {measure}.

```python
from sentence_transformers import SentenceTransformer

queries = SentenceTransformer("this-folder").encode(["Who wrote Hamlet?"])
```

They are compared with the embeddings of the sequence encoder (Embseq), which the export `embseq` holds; `retriever`
holds both. The prompt `{prompt}` and `[NSP]` are put around a question by the tokenizer.
""",
    "embseq": """# {name}

The sequence encoder (Embseq) of a model trained by semiparametric token-sequence co-supervision
([Lee et al., ACL 2024](https://arxiv.org/abs/2403.09024)): its last hidden state at the end-of-sequence token is the
embedding of a passage. Scores: {measure}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this-folder")
embeddings = model.encode(["Hamlet :: Hamlet is a tragedy by William Shakespeare."])
```

Passages were trained as `{passage}`, at most {limit} tokens; longer ones are cut. This is the passages' side alone. A
question encoded with it is compared as if it were a passage; the query of the method is the generator's hidden state at
`[NSP]`, which the export `retriever` holds, too.
""",
    "gen": """# {name}

The generator (Gen) of a model trained by semiparametric token-sequence co-supervision
([Lee et al., ACL 2024](https://arxiv.org/abs/2403.09024)), as a plain causal language model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this-folder")
model = AutoModelForCausalLM.from_pretrained("this-folder")
```

It was trained on `{prompt}` and the output behind it. Where it writes `[NSP]`, its last hidden state is a query, and
`{passage}` of the passage found goes into its context, then `[Cs]`; it goes on with the text grounded on that passage,
and `[Ce]`. Without an index, ban `[NSP]`.
""",
}
