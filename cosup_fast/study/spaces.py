"""How the token space and the sequence space lie to each other while both are trained.

    cka_passages  of passages: Gen's last hidden state after reading one, against Embseq's sequence embedding of it
    cka_queries   of queries at [NSP], against the sequence embeddings of what they ask for
    alignment     E |q - k+|^2, uniformity log E exp(-2 |x - y|^2), of queries and of passages, all of unit length

CKA is linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414) with the unbiased estimator of HSIC
(Song et al. 2012): 1 where one space is the other turned and scaled, about 0 where they are independent; with fewer
samples than dimensions the usual estimator would be near 1 whatever they are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cosup_fast.config import RunConfig
from cosup_fast.data.mapped import sorted_ids
from cosup_fast.data.packing import Pack
from cosup_fast.data.records import Example, Passage
from cosup_fast.files import replace_file
from cosup_fast.index.embed import embed_passages, embed_queries, evaluation_mode
from cosup_fast.model import CoSupervisionModel
from cosup_fast.study.config import StudyError
from cosup_fast.training.callbacks import Callback
from cosup_fast.training.diagnostics import uniformity
from cosup_fast.training.log import read_metrics
from cosup_fast.training.run import load_data

SPACES_FILE = "spaces.jsonl"
POOL = 256
"""Passages that both models read."""
READ_AT_ONCE = 32


def look(
    model: CoSupervisionModel, examples: Sequence[Example], corpus: Mapping[str, Passage], pool: Sequence[Passage]
) -> dict[str, float | None]:
    """The figures of a model that has an Embseq.

    Args:
        model: as it is, at any step of its training.
        examples: whose queries are compared with what they ask for.
        corpus: passages by id.
        pool: the passages that both models read.
    """
    passages = embed_passages(model, pool)
    queries, origins = embed_queries(model, examples, corpus)
    wanted = embed_passages(model, [corpus[name] for _, name in origins])
    q, k = normalize(queries, dim=-1), normalize(wanted, dim=-1)
    figures = {
        "cka_passages": cka(_read(model, pool), passages),
        "cka_queries": cka(queries, wanted),
        "alignment": float((q - k).square().sum(dim=-1).mean()) if len(q) else None,
        "query_uniformity": uniformity(q),
        "passage_uniformity": uniformity(normalize(passages, dim=-1)),
    }
    return {name: None if value is None else round(value, 5) for name, value in figures.items()}


class SpaceLog(Callback):
    """`look` at every held-out evaluation of a run, a line each in a file; a part that is run again replaces its lines.

    Args:
        path: the file.
        run: whose held-out examples ask, among whose corpus `POOL` passages are read.

    Raises:
        StudyError: the run has no Embseq, or nothing is held out.
    """

    def __init__(self, path: Path, run: RunConfig):
        self._path = path
        self._corpus, _, self._examples, _ = load_data(run)
        if not self._examples or run.nsp.weight == 0:
            raise StudyError(
                "probes: spaces compares Gen with Embseq on data.dev: it needs nsp.weight > 0 and data.dev"
            )
        names = sorted_ids(self._corpus)
        self._pool = [self._corpus[name] for name in random.Random(0).sample(names, min(POOL, len(names)))]

    def evaluated(self, model: CoSupervisionModel, step: int) -> None:
        before = [line for line in read_metrics(self._path) if line["step"] < step]
        now = {"kind": "spaces", "step": step, **look(model, self._examples, self._corpus, self._pool)}
        with replace_file(self._path) as file:
            file.writelines(json.dumps(line) + "\n" for line in (*before, now))


def cka(x: Tensor, y: Tensor) -> float | None:
    """Linear CKA of n samples in two spaces, x (n, D) and y (n, E); None from fewer than four."""
    if len(x) < 4:
        return None
    k, l = (z.double() @ z.double().T for z in (x, y))
    k.fill_diagonal_(0)
    l.fill_diagonal_(0)
    scale = (_hsic(k, k) * _hsic(l, l)).clamp(min=0).sqrt()
    return float(_hsic(k, l) / scale) if scale > 0 else None


def _hsic(k: Tensor, l: Tensor) -> Tensor:
    """The unbiased estimator, times n (n - 3), of Gram matrices with a zero diagonal."""
    n = len(k)
    means = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(dim=0) @ l.sum(dim=0))
    return (k * l).sum() + means


@torch.no_grad()
def _read(model: CoSupervisionModel, passages: Sequence[Passage]) -> Tensor:
    """Gen's last hidden state of each passage that it reads alone, (n, D) fp32."""
    sequences = [model.template.start + model.template.inserted_passage(passage) for passage in passages]
    states = []
    with evaluation_mode(model):
        for start in range(0, len(sequences), READ_AT_ONCE):
            pack = Pack.of(sequences[start : start + READ_AT_ONCE]).to(model.device)
            states.append(model.hidden_states(pack)[pack.last_rows].float().cpu())
    return torch.cat(states)
