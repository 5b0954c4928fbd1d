"""The published training step restated and corrected, with every optimisation of the library's step as a switch.

    recipe      right-padded batches of both models, the final norm on every row, logits of every position, dense
                scores, each passage encoded as often as it is asked for
    packed      sequences laid end to end: no pad token
    supervised  logits of supervised rows alone
    fused       both losses without logits or scores: `functional.linear_cross_entropy` and `info_nce`; supervised rows
    norm rows   the final norm on rows that a loss reads alone
    once        a passage that is asked for twice is encoded once

All of them give the same loss and gradients; `ours` is the library's own step, `training.step.accumulate_gradients`.
Corrected: passages are read at their last token, not at padding; padding has no label; a query's own passage under
another [NSP] is not a negative. Source: Lee et al. 2024, arXiv 2403.09024, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cosup_fast.data.packing import CoSupervisionBatch, Pack
from cosup_fast.functional import info_nce, linear_cross_entropy
from cosup_fast.losses import CoSupervisionOutput
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.backbone import FinalNorm, bypassed, norm_rows, run_pack
from cosup_fast.training.step import accumulate_gradients


class Switches(NamedTuple):
    packed: bool = False
    supervised: bool = False
    fused: bool = False
    norm_rows: bool = False
    once: bool = False


VARIANTS = {
    "recipe": Switches(),
    "packed": Switches(packed=True),
    "supervised": Switches(supervised=True),
    "fused": Switches(supervised=True, fused=True),
    "norm rows": Switches(norm_rows=True),
    "once": Switches(once=True),
    "all switches": Switches(*(True,) * 5),
}
OURS = "ours"


def step(name: str, model: CoSupervisionModel, batch: CoSupervisionBatch) -> Callable[[], CoSupervisionOutput]:
    """Forward and backward of one variant; what depends on the data alone is done here."""
    if name == OURS:
        return lambda: accumulate_gradients(model, batch)
    recipe = Recipe(model, batch, VARIANTS[name])

    def run() -> CoSupervisionOutput:
        out = recipe.loss()
        out.loss.backward()
        return CoSupervisionOutput(out.loss.detach(), out.ntp.detach(), out.nsp.detach(), None)

    return run


class Recipe:
    """The loss of a batch that is one pack for each model, computed as the switches say."""

    def __init__(self, model: CoSupervisionModel, batch: CoSupervisionBatch, switches: Switches):
        (gen,), (passages,) = batch.gen, batch.passages
        self.model, self.batch, self.switches = model, batch, switches
        self.gen = _Layout(list(gen.pack.input_ids.split(gen.pack.lengths)), switches.packed)
        distinct = list(passages.input_ids.split(passages.lengths))
        asked = torch.arange(len(distinct)) if switches.once else batch.positive
        self.passages = _Layout([distinct[row] for row in asked.tolist()], switches.packed)
        # Where each distinct passage comes first among those that are encoded.
        self.first = torch.stack([(asked == row).nonzero()[0, 0] for row in range(len(distinct))])
        self.query_rows, self.supervised_rows = self.gen.rows(gen.query_rows), self.gen.rows(gen.supervised_rows)
        self.targets = gen.targets
        self.labels = torch.full((self.gen.size,), -100).index_copy(0, self.supervised_rows, gen.targets)
        self.positive = F.one_hot(batch.positive, len(distinct)).bool()
        if batch.positive_ids is not None:
            self.positive |= (batch.positive_ids[:, :, None] == batch.key_ids).any(1)

    def loss(self) -> CoSupervisionOutput:
        model, switches = self.model, self.switches
        backbone, embseq = model.gen.base_model, model.embseq or model.gen.base_model
        gen_norm, embseq_norm = (model.gen_norm, model.embseq_norm) if switches.norm_rows else (None, None)
        states = self.gen.run(backbone, gen_norm)
        head: Any = model.gen.get_output_embeddings()
        if switches.supervised:
            hidden, target = norm_rows(backbone, states, self.supervised_rows, gen_norm), self.targets
        else:
            hidden, target = norm_rows(backbone, states, torch.arange(len(states)), gen_norm), self.labels
        ntp = (linear_cross_entropy if switches.fused else dense_cross_entropy)(hidden, head.weight, target)
        query = norm_rows(backbone, states, self.query_rows, gen_norm, normalize=True)
        ends = self.passages.run(embseq, embseq_norm)
        keys = norm_rows(embseq, ends, self.passages.last_rows[self.first], embseq_norm, normalize=True)
        if switches.fused:
            further = self.batch.positive_ids
            nsp = info_nce(
                query,
                keys,
                self.batch.positive,
                scale=1 / model.nsp.temperature,
                key_ids=None if further is None else self.batch.key_ids,
                positive_ids=further,
            )
        else:
            scores = query @ keys.T / model.nsp.temperature
            nsp = (scores.logsumexp(1) - scores.masked_fill(~self.positive, -torch.inf).logsumexp(1)).mean()
        return CoSupervisionOutput(ntp + model.nsp.weight * nsp, ntp, nsp, None)


def dense_cross_entropy(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy by way of all logits."""
    return F.cross_entropy(F.linear(hidden, head), target, ignore_index=-100)


class _Layout:
    """Sequences in a pack or in a padded batch; rows count over (T,) or over the flattened (B, L)."""

    def __init__(self, sequences: list[Tensor], packed: bool):
        self.pack = Pack.of([ids.tolist() for ids in sequences])
        self.packed = packed
        lengths = torch.tensor(self.pack.lengths)
        self.size = len(self.pack.input_ids) if packed else len(lengths) * int(lengths.max())
        self.padded = pad_sequence(sequences, batch_first=True)
        self.mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        self.place = self.mask.flatten().nonzero()[:, 0]  # of each token of the pack in the padded batch

    def rows(self, rows: Tensor) -> Tensor:
        """Rows of the pack, as rows of this layout."""
        return rows if self.packed else self.place[rows]

    @property
    def last_rows(self) -> Tensor:
        return self.rows(self.pack.last_rows)

    def run(self, backbone: Any, norm: FinalNorm | None) -> Tensor:
        if self.packed:
            return run_pack(backbone, self.pack, norm)
        with bypassed(backbone, norm):
            out = backbone(input_ids=self.padded, attention_mask=self.mask, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)
