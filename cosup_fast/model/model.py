"""Gen and Embseq: two `transformers` causal LMs, one that writes and one that turns a passage into a vector.

Both run on packs and give hidden states; training never forms logits. A query is Gen's last hidden state at [NSP]; a
sequence embedding is Embseq's last hidden state at the end-of-sequence token that closes the passage, both after the
final norm. With `similarity="cosine"` both leave here L2-normalised, so that losses and indexes only ever see inner
products. Source: Lee et al. 2024, arXiv 2403.09024, section 3.

Shapes: T tokens of a pack, S sequences in it, N queries, M passages, D Gen's width, D_e Embseq's width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from cosup_fast.config.model import Attention, ModelConfig, NSPConfig, NTPConfig, Recompute
from cosup_fast.data.packing import CoSupervisionBatch, GenPack, Pack
from cosup_fast.data.sources import resolve_checkpoint
from cosup_fast.data.template import Template, TextConfig
from cosup_fast.functional import gather_last_hidden
from cosup_fast.kernels.numerics import accumulator
from cosup_fast.losses import CoSupervisionOutput
from cosup_fast.model.adapters import add_adapters, has_adapters, load_adapters, merge_adapters, unwrapped
from cosup_fast.model.backbone import FinalNorm, find_final_norm, norm_rows, run_pack
from cosup_fast.model.criterion import make_criterion
from cosup_fast.model.folder import (
    HEADS,
    Changes,
    check_heads,
    heads_of,
    load_parts,
    save_folder,
    weights_digest,
    whole_weights,
)
from cosup_fast.model.layers import compile_layers, recompute_activations
from cosup_fast.model.linear import linear
from cosup_fast.model.loading import (
    Base,
    check_adapters,
    check_vocabulary,
    embed_special_tokens,
    lm_head,
    load_language_model,
    load_template,
)
from cosup_fast.model.trial import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cosup_fast.distributed import Peers
    from cosup_fast.reference import Stats

R = TypeVar("R")


class CoSupervisionModel(nn.Module):
    """Gen and Embseq under one `forward` that returns the co-supervision loss.

    Args:
        gen: a causal LM whose vocabulary holds the special tokens.
        embseq: a causal LM without head; None shares Gen's weights, unless `has_embseq` is false.
        template: the text template with both tokenizers.
        nsp, ntp: the settings of both losses.
        freeze_embseq: Embseq takes no gradient; its projection, if any, still does.
        has_embseq: false for a Gen that stands alone: it writes, and embeds neither passages nor queries.
    """

    gen: PreTrainedModel
    embseq: PreTrainedModel | None
    projection: nn.Linear | None
    gen_norm: FinalNorm | None
    embseq_norm: FinalNorm | None
    """The final norms, where they can run on the rows alone that are read."""
    sharded = False
    """Whether ranks share the weights (`training.sharding.shard`)."""

    def __init__(
        self,
        gen: PreTrainedModel,
        embseq: PreTrainedModel | None,
        template: Template,
        nsp: NSPConfig,
        *,
        ntp: NTPConfig | None = None,
        freeze_embseq: bool = False,
        has_embseq: bool = True,
    ):
        super().__init__()
        self.gen = gen
        self.embseq = embseq
        self.template = template
        self.nsp = nsp
        self.ntp = ntp or NTPConfig()
        self.has_embseq = has_embseq
        self.freeze_embseq = freeze_embseq
        self.bases: dict[str, Base] = {}  # of the parts that have adapters
        self.width = gen.config.get_text_config().hidden_size
        self.embseq_width = self.width if embseq is None else embseq.config.get_text_config().hidden_size
        # Orthogonal: a projection that keeps the angles between sequence embeddings is the neutral start.
        self.projection = None
        if self.embseq_width != self.width:
            weight = nn.init.orthogonal_(torch.empty(self.width, self.embseq_width))
            self.projection = nn.Linear(self.embseq_width, self.width, bias=False).to(gen.dtype)
            self.projection.weight.data.copy_(weight)
        self.criterion = make_criterion(gen, nsp, self.ntp)
        for part in filter(None, (gen, embseq)):
            # Packs hold no padding, and a model that pads with its end-of-sequence token would never learn that one.
            embeddings: Any = part.get_input_embeddings()
            embeddings.padding_idx = None
        if freeze_embseq and embseq is not None:
            embseq.requires_grad_(False)
        self.gen_norm = find_final_norm(gen.base_model)
        self.embseq_norm = self.gen_norm if embseq is None else find_final_norm(embseq)

    @classmethod
    def from_pretrained(
        cls,
        model: ModelConfig,
        text: TextConfig | None = None,
        nsp: NSPConfig | None = None,
        *,
        ntp: NTPConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Two pretrained causal LMs, with special tokens added to Gen; Gen alone where `nsp.weight` is 0.

        Args:
            model: which, and how much of them.
            text: the template's settings.
            nsp, ntp: the settings of both losses.
            device: where they go; "meta" reads and checks no weights, for ranks that get them from another one
                (`training.sharding`).

        Raises:
            ValueError: a name that is neither prepared, nor a folder, nor on the hub; more layers than there are;
                weights that are not safetensors; a tokenizer with tokens that its model has no embedding of; a model
                that cannot run on packs, or whose logits are more than `logits` knows; adapters for layers that it does
                not have.
        """
        device, nsp = torch.device(device), nsp or NSPConfig()
        has_embseq = nsp.weight > 0
        if not has_embseq:
            model = model.alone()
        check_adapters(model)
        template, new = load_template(model, text or TextConfig())
        gen = load_language_model(model.gen, model, device, layers=model.gen_layers)
        check_vocabulary(gen, template.tokenizer, model.gen, [*template.start, template.eos])
        if new:
            embed_special_tokens(gen, template)
        gen.config.pad_token_id = template.pad
        embseq = None
        if not model.shared:
            embseq = load_language_model(
                model.embseq or model.gen, model, device, layers=model.embseq_layers, head=False
            )
            around = [*template.embseq_start, *template.embseq_end]
            check_vocabulary(embseq, template.embseq_tokenizer, model.embseq or model.gen, around)
        made = cls(gen, embseq, template, nsp, ntp=ntp, freeze_embseq=model.freeze_embseq, has_embseq=has_embseq).to(
            device
        )
        check_model(made, model.gen, model.embseq or model.gen)
        if model.gen_lora.rank:
            made.adapt("gen", Base.of(model.gen, model.gen_layers, model.gen_lora, new))
        if model.embseq_lora.rank:
            made.adapt("embseq", Base.of(model.embseq or model.gen, model.embseq_layers, model.embseq_lora))
        return made

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        attention: Attention = "auto",
        merge: bool = True,
        changes: Changes | None = None,
    ) -> Self:
        """A checkpoint folder that `save` wrote.

        Args:
            folder: the checkpoint, or the name of a prepared one; of a run's folder
                `training.checkpoint.chosen_checkpoint` names one.
            device: where it goes.
            attention: as in `ModelConfig`.
            changes: settings that are to be others than those that were saved, as where another run begins with it.
            merge: fold adapters into the weights, so that a plain model is what is left; False: to train them further.

        Raises:
            ValueError: the folder is not a co-supervised checkpoint, of another format version, or incomplete; the
                weights that its adapters belong to have changed; or what `from_pretrained` refuses of its models.
        """
        folder, device = resolve_checkpoint(Path(folder)), torch.device(device)
        with whole_weights(folder):
            parts = load_parts(folder, device, attention, changes)
            model = cls(
                parts.gen,
                parts.embseq,
                parts.template,
                parts.nsp,
                ntp=parts.ntp,
                freeze_embseq=parts.freeze_embseq,
                has_embseq=parts.has_embseq,
            )
            heads, made = parts.heads, heads_of(model)
            if changes is not None:  # the temperature is theirs
                heads = {name: heads.get(name, x) if name.startswith("projection.") else x for name, x in made.items()}
            check_heads(folder / HEADS, heads, made)
            model.load_state_dict(heads, strict=False)
            model.to(device)
            check_model(model, str(folder / "gen"), str(folder / "embseq"))
            for name, base in parts.bases.items():
                model.adapt(name, base)
                load_adapters(getattr(model, name), folder / name)
        return model.merge() if merge else model

    def save(self, folder: str | Path) -> None:
        """Writes both models as Hugging Face folders, and what joins them, into an existing or new folder.

        Of a model with adapters these alone are written, and where the weights under them come from.
        """
        save_folder(self, Path(folder))

    def merge(self) -> Self:
        """Folds all adapters into the weights, for good; a model without any stays as it is."""
        for name, part in self.parts():
            if has_adapters(part):
                merge_adapters(part)
                del self.bases[name]
        return self

    def forward(
        self, batch: CoSupervisionBatch, *, ntp_count: int | None = None, nsp_count: int | None = None
    ) -> CoSupervisionOutput:
        """The loss of a batch: w * NTP + lambda * NSP. With lambda = 0, NSP is reported and reaches no parameter.

        With w = 0 NTP is computed where nothing is differentiated, as a diagnosis, and is 0 elsewhere; without an
        Embseq NSP is a constant 0.
        Where it is differentiated the activations of all packs are kept; `training.step` keeps those of one.

        Args:
            batch: packs and targets.
            ntp_count: supervised tokens of the whole step, when this batch is a part of it.
            nsp_count: queries of the whole step, likewise.
        """
        ntp_count = batch.ntp_count if ntp_count is None else ntp_count
        with_ntp = self.ntp.weight > 0 or not torch.is_grad_enabled()
        losses, queries = zip(*(self.gen_losses(part, ntp_count, ntp=with_ntp) for part in batch.gen), strict=True)
        ntp, query = torch.stack(losses).sum(), torch.cat(queries)
        if not self.has_embseq:
            nsp = torch.zeros_like(ntp)
            return CoSupervisionOutput(self.criterion.combine(ntp, nsp), ntp, nsp, None)
        with self.nsp_gradient():
            states = [self.sequence_states(part) for part in batch.passages]
            keys = self.project(torch.cat(states)) if states else query[:0]
        nsp, stats = self.nsp_loss(query, keys, batch, count=nsp_count)
        return CoSupervisionOutput(self.criterion.combine(ntp, nsp), ntp, nsp, stats)

    def ntp_loss(self, hidden: Tensor, targets: Tensor, *, count: int | None = None) -> Tensor:
        """Next token prediction of supervised rows (n, D), after the final norm, and their targets (n,)."""
        head = lm_head(self.gen)
        return self.criterion.ntp(hidden, head.weight, targets, bias=unwrapped(head).bias, count=count)

    def nsp_loss(
        self,
        query: Tensor,
        keys: Tensor,
        batch: CoSupervisionBatch,
        *,
        count: int | None = None,
        group: Peers | None = None,
    ) -> tuple[Tensor, Stats | None]:
        """Next sequence prediction of all queries (N, D) of a step against all its passages (M, D), and its statistics.

        With `group` it is this rank's share, and every rank calls it, if with (0, D). Without queries in the whole step
        it is a constant 0 and nobody is asked.
        """
        if not batch.step.nsp:
            return query.new_zeros((), dtype=accumulator(query.dtype)), None
        with self.nsp_gradient():
            return self.criterion.nsp(
                query,
                keys,
                batch.positive,
                # Passages are distinct already: ids only say which ones are further positives.
                key_ids=None if batch.positive_ids is None else batch.key_ids,
                positive_ids=batch.positive_ids,
                count=count,
                group=group,
                positive_rows="group",
                return_stats=True,
            )

    def nsp_gradient(self) -> AbstractContextManager[Any]:
        """Without gradient where lambda is 0: then no graph is kept for NSP's sake."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.nsp.weight > 0)

    def hidden_states(self, pack: Pack) -> Tensor:
        """Gen's hidden states after the final norm, (T, D)."""
        return self._inside(self.gen, lambda: run_pack(self.gen.base_model, pack))

    def gen_losses(self, part: GenPack, count: int, *, ntp: bool = True) -> tuple[Tensor, Tensor]:
        """What a pack of Gen's brings to a step: the sum of NTP over `count`, and its queries (N, D).

        Without `ntp` that sum is a constant 0, no supervised row is gathered, and no product with the head is formed.
        """

        def run() -> tuple[Tensor, Tensor]:
            states = self._gen_states(part.pack)
            query = self._queries(states, part.query_rows)
            if not ntp:
                return states.new_zeros((), dtype=accumulator(states.dtype)), query
            return self.ntp_loss(self._at(states, part.supervised_rows), part.targets, count=count), query

        return self._inside(self.gen, run)

    def query_embeddings(self, pack: Pack, rows: Tensor) -> Tensor:
        """Query embeddings (N, D) of the rows of [NSP] (N,) in a pack of Gen's."""
        return self._inside(self.gen, lambda: self._queries(self._gen_states(pack), rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """Gen's logits (..., V) of hidden states (..., D), those that NTP is the cross-entropy of.

        z = softcap tanh(a / softcap)    a = scale W h + b    with the scale and softcap that Gen's configuration names.
        """
        head, ntp = lm_head(self.gen), self.criterion.ntp
        logits = linear(hidden, head.weight)
        logits = logits if ntp.scale == 1 else logits * ntp.scale
        logits = logits if (bias := unwrapped(head).bias) is None else logits + bias
        return logits if ntp.softcap is None else ntp.softcap * torch.tanh(logits / ntp.softcap)

    def queries(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Query embeddings (N, D) from Gen's hidden states (T, D) at the rows of [NSP] (N,)."""
        return gather_last_hidden(hidden, rows, normalize=self.nsp.unit)

    def embed(self, pack: Pack) -> Tensor:
        """Sequence embeddings (S, D), one for each passage of a pack."""
        return self.project(self.sequence_states(pack))

    def sequence_states(self, pack: Pack) -> Tensor:
        """What Embseq itself makes of the passages of a pack, (S, D_e), to go through `project`.

        Raises:
            ValueError: there is no Embseq.
        """
        self.require_embseq("passages cannot be embedded")
        model = self.gen.base_model if self.embseq is None else self.embseq
        unit = self.projection is None and self.nsp.unit

        def run() -> Tensor:
            hidden = run_pack(model, pack, self.embseq_norm)
            return norm_rows(model, hidden, pack.last_rows, self.embseq_norm, normalize=unit)

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_embseq):
            return self._inside(self.gen if self.embseq is None else self.embseq, run)

    def project(self, states: Tensor) -> Tensor:
        """Sequence embeddings (S, D) from `sequence_states`: the same, but where the widths of the models differ."""
        if self.projection is None:
            return states
        embedding = self.projection(states)
        return nn.functional.normalize(embedding, dim=-1) if self.nsp.unit else embedding

    def _queries(self, states: Tensor, rows: Tensor) -> Tensor:
        with self.nsp_gradient():
            return self._at(states, rows, normalize=self.nsp.unit)

    def _inside(self, part: PreTrainedModel, run: Callable[[], R]) -> R:
        """Runs what reads a model's weights; of a sharded one they are whole only inside (see `training.sharding`)."""
        return cast(Any, part).run_inside(run) if hasattr(part, "run_inside") else run()

    def _gen_states(self, pack: Pack) -> Tensor:
        return run_pack(self.gen.base_model, pack, self.gen_norm)

    def _at(self, states: Tensor, rows: Tensor, *, normalize: bool = False) -> Tensor:
        return norm_rows(self.gen.base_model, states, rows, self.gen_norm, normalize=normalize)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.gen.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, those in 4 bits and adapters aside."""
        return unwrapped(self.gen.get_input_embeddings()).weight.dtype

    @property
    def vocabulary(self) -> int:
        """V, the rows of Gen's head."""
        return len(unwrapped(lm_head(self.gen)).weight)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the template and the geometry: what decides every query and every embedding."""
        about = json.dumps([self.template.config.model_dump(), self.nsp.similarity], sort_keys=True)
        return weights_digest(self, about)

    def train(self, mode: bool = True) -> Self:
        """Training mode; a frozen Embseq stays in evaluation mode, so that dropout does not move it."""
        super().train(mode)
        if self.freeze_embseq and self.embseq is not None:
            self.embseq.eval()
        return self

    def enable_activation_checkpointing(self, kind: Recompute = "full") -> None:
        """Recomputes each decoder layer's activations in the backward pass instead of keeping them, all or some."""
        for name, part in self.parts():
            if not (name == "embseq" and self.freeze_embseq):
                recompute_activations(part, kind)

    def compile_layers(self, *, fixed_shapes: bool = False) -> None:
        """Compiles the decoder layers of both models, when each first runs; see `layers.compile_layers`."""
        for name, part in self.parts():
            compile_layers(part, name.capitalize(), fixed_shapes=fixed_shapes)

    def require_embseq(self, otherwise: str) -> None:
        """Refuses work that needs an Embseq where there is none.

        Raises:
            ValueError: there is none; `otherwise` says what cannot be done.
        """
        if not self.has_embseq:
            raise ValueError(
                f"{otherwise}: this model is a Gen without an Embseq, trained with nsp.weight=0. Give a checkpoint of "
                "a run with nsp.weight above 0; this one writes without passages (--max-retrievals 0) or with those of "
                "another retriever (evaluate --system dense:NAME or pair:RUN)"
            )

    @property
    def shared(self) -> bool:
        """Whether Embseq is Gen itself."""
        return self.has_embseq and self.embseq is None

    def parts(self) -> list[tuple[str, PreTrainedModel]]:
        """Both models by name; one where they share weights."""
        return [("gen", self.gen)] + ([] if self.embseq is None else [("embseq", self.embseq)])

    def adapt(self, name: str, base: Base) -> None:
        """Adds the adapters of "gen" or "embseq"."""
        t = self.template
        add_adapters(getattr(self, name), base.lora, [t.nsp, t.context_start, t.context_end, t.pad] * (name == "gen"))
        self.bases[name] = base
