"""Gen and Embseq: two `transformers` causal LMs, one that writes and one that turns a passage into a vector.

Both run on packs and give hidden states; training never forms logits. A query is Gen's last hidden state at [NSP]; a
sequence embedding is Embseq's last hidden state at the end-of-sequence token that closes the passage, both after the
final norm. With `similarity="cosine"` both leave here L2-normalised, so that losses and indexes only ever see inner
products. Source: Lee et al. 2024, arXiv 2403.09024, section 3.

Shapes: T tokens of a pack, S sequences in it, N queries, M passages, D Gen's width, D_e Embseq's width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from cosup_fast.attention import PACKED_SDPA, choose_attention
from cosup_fast.backbone import (
    agree,
    check_packs,
    ends_in,
    find_final_norm,
    norm_rows,
    positions,
    probe,
    run_pack,
    unpackable,
)
from cosup_fast.data.packing import CoSupervisionBatch, GenPack, Pack
from cosup_fast.data.sources import resolve_model
from cosup_fast.data.template import DESCRIPTIONS, Template, TextConfig, add_special_tokens
from cosup_fast.functional import gather_last_hidden
from cosup_fast.kernels.last_hidden import accumulator
from cosup_fast.linear import linear
from cosup_fast.losses import CoSupervisionLoss, CoSupervisionOutput, InfoNCELoss, LinearCrossEntropyLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cosup_fast.reference import Stats

FORMAT_VERSION = 1

Attention = Literal["auto", "packed_sdpa", "flash_attention_2"]


class ModelConfig(BaseModel):
    """Which two models, and how much of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gen: str = Field(default="smollm2-135m", description="Gen: a prepared name, a local folder or a Hugging Face name")
    embseq: str | None = Field(default=None, description="Embseq, likewise; null means the same model as gen")
    shared: bool = Field(default=False, description="Embseq is Gen itself: one set of weights")
    freeze_embseq: bool = Field(default=False, description="Embseq's weights stay as they are")
    gen_layers: int | None = Field(default=None, ge=1, description="keep only the first layers of Gen")
    embseq_layers: int | None = Field(default=None, ge=1, description="keep only the first layers of Embseq")
    attention: Attention = Field(default="auto", description="auto: FlashAttention where it can run, else packed_sdpa")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(default="float32", description="dtype of the weights")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shared and (self.embseq not in (None, self.gen) or self.embseq_layers not in (None, self.gen_layers)):
            raise ValueError(
                f"model.shared=true uses Gen as Embseq, so model.embseq={self.embseq!r} and "
                f"model.embseq_layers={self.embseq_layers} cannot differ from Gen's: leave them null"
            )
        if self.shared and self.freeze_embseq:
            raise ValueError(
                "model.shared=true with model.freeze_embseq=true would freeze Gen: set one of them to false"
            )
        if self.attention == "flash_attention_2" and self.dtype == "float64":
            raise ValueError("model.attention=flash_attention_2 takes 16-bit inputs, not model.dtype=float64")
        return self


class NSPConfig(BaseModel):
    """The next-sequence-prediction loss: its weight in the sum and the geometry of its space."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=1.0, ge=0, description="lambda: loss = NTP + lambda * NSP")
    similarity: Literal["dot", "cosine"] = Field(default="cosine", description="inner product, raw or of unit vectors")
    temperature: float = Field(
        default=0.05, gt=0, description="scores are divided by it (dot / sqrt(D): the root of D)"
    )
    learnable_temperature: bool = Field(
        default=False, description="train the temperature, starting from the value given"
    )
    symmetric: bool = Field(default=False, description="also contrast passages against queries")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class CoSupervisionModel(nn.Module):
    """Gen and Embseq under one `forward` that returns the co-supervision loss.

    Args:
        gen: a causal LM whose vocabulary holds the special tokens.
        embseq: a causal LM without head; None shares Gen's weights.
        template: the text template with both tokenizers.
        nsp: the loss settings.
        freeze_embseq: Embseq takes no gradient; its projection, if any, still does.
    """

    gen: PreTrainedModel
    embseq: PreTrainedModel | None
    projection: nn.Linear | None

    def __init__(
        self,
        gen: PreTrainedModel,
        embseq: PreTrainedModel | None,
        template: Template,
        nsp: NSPConfig,
        *,
        freeze_embseq: bool = False,
    ):
        super().__init__()
        self.gen = gen
        self.embseq = embseq
        self.template = template
        self.nsp = nsp
        self.freeze_embseq = freeze_embseq
        self.width = gen.config.get_text_config().hidden_size
        embseq_width = self.width if embseq is None else embseq.config.get_text_config().hidden_size
        # Orthogonal: a projection that keeps the angles between sequence embeddings is the neutral start.
        self.projection = None
        if embseq_width != self.width:
            weight = nn.init.orthogonal_(torch.empty(self.width, embseq_width))
            self.projection = nn.Linear(embseq_width, self.width, bias=False).to(gen.dtype)
            self.projection.weight.data.copy_(weight)
        self.criterion = CoSupervisionLoss(
            nsp_weight=nsp.weight,
            ntp=LinearCrossEntropyLoss(ignore_index=None, **_logit_options(gen)),  # supervised rows alone come in
            nsp=InfoNCELoss(
                temperature=nsp.temperature,
                learnable_scale=nsp.learnable_temperature,
                symmetric=nsp.symmetric,
                label_smoothing=nsp.label_smoothing,
            ),
        )
        for part in filter(None, (gen, embseq)):
            # Packs hold no padding, and a model that pads with its end-of-sequence token would never learn that one.
            embeddings: Any = part.get_input_embeddings()
            embeddings.padding_idx = None
        if freeze_embseq and embseq is not None:
            embseq.requires_grad_(False)
        self._gen_norm = find_final_norm(gen.base_model)
        self._embseq_norm = self._gen_norm if embseq is None else find_final_norm(embseq)

    @classmethod
    def from_pretrained(
        cls,
        model: ModelConfig,
        text: TextConfig | None = None,
        nsp: NSPConfig | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Two pretrained causal LMs, with special tokens added to Gen.

        Raises:
            ValueError: a name that is neither prepared, nor a folder, nor on the hub; more layers than there are;
                weights that are no safetensors; a model that cannot run on packs, or whose logits are more than
                `logits` knows.
        """
        device = torch.device(device)
        template, new = _load_template(model, text or TextConfig())
        gen = _load(model.gen, model, device, layers=model.gen_layers)
        if new:
            _embed_special_tokens(gen, template)
        gen.config.pad_token_id = template.pad
        embseq = None
        if not model.shared:
            embseq = _load(model.embseq or model.gen, model, device, layers=model.embseq_layers, head=False)
        made = cls(gen, embseq, template, nsp or NSPConfig(), freeze_embseq=model.freeze_embseq).to(device)
        made._check_models(model.gen, model.embseq or model.gen)
        return made

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu", attention: Attention = "auto") -> Self:
        """A checkpoint folder that `save` wrote.

        Raises:
            ValueError: the folder is no co-supervised checkpoint, of another format version, or incomplete; or what
                `from_pretrained` refuses of its models.
        """
        folder = Path(folder)
        try:
            return cls._load_folder(folder, torch.device(device), attention)
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged ({error}): use another copy or checkpoint") from None

    @classmethod
    def _load_folder(cls, folder: Path, device: torch.device, attention: Attention) -> Self:
        description = read_description(folder)
        shared = description["shared"]
        parts = ModelConfig(
            gen=str(folder / "gen"),
            embseq=None if shared else str(folder / "embseq"),
            shared=shared,
            attention=attention,
            dtype=description["dtype"],
        )
        text, nsp = TextConfig(**description["text"]), NSPConfig(**description["nsp"])
        template = load_template(parts, text)
        gen = _load(parts.gen, parts, device)
        embseq = None if parts.embseq is None else _load(parts.embseq, parts, device, head=False)
        model = cls(gen, embseq, template, nsp, freeze_embseq=description["freeze_embseq"])
        if not (folder / "heads.safetensors").is_file():
            raise ValueError(f"{folder} is incomplete: heads.safetensors is missing")
        heads = load_file(folder / "heads.safetensors")
        model.load_state_dict(heads, strict=False)
        expected = set(model._head_state())
        if expected != set(heads):
            raise ValueError(f"{folder / 'heads.safetensors'} holds {sorted(heads)}, expected {sorted(expected)}")
        model.to(device)
        model._check_models(str(folder / "gen"), str(folder / "embseq"))
        return model

    def save(self, folder: str | Path) -> None:
        """Writes both models as Hugging Face folders, and what joins them, into an existing or new folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            self.gen.save_pretrained(folder / "gen")
            self.template.tokenizer.save_pretrained(folder / "gen")
            if self.embseq is not None:
                self.embseq.save_pretrained(folder / "embseq")
                self.template.embseq_tokenizer.save_pretrained(folder / "embseq")
        save_file(self._head_state(), folder / "heads.safetensors")
        description = {
            "format_version": FORMAT_VERSION,
            "shared": self.embseq is None,
            "freeze_embseq": self.freeze_embseq,
            "dtype": str(self.gen.dtype).removeprefix("torch."),
            "text": self.template.config.model_dump(),
            "nsp": self.nsp.model_dump(),
        }
        (folder / "cosup.json").write_text(json.dumps(description, indent=2) + "\n")

    def forward(
        self, batch: CoSupervisionBatch, *, ntp_count: int | None = None, nsp_count: int | None = None
    ) -> CoSupervisionOutput:
        """The loss of a batch: NTP + lambda * NSP. With lambda = 0, NSP is reported and reaches no parameter.

        Where it is differentiated the activations of all packs are kept; `training.step` keeps those of one.

        Args:
            batch: packs and targets.
            ntp_count: supervised tokens of the whole step, when this batch is a part of it.
            nsp_count: queries of the whole step, likewise.
        """
        hidden, query = map(torch.cat, zip(*(self.gen_rows(part) for part in batch.gen), strict=True))
        with self.nsp_gradient():
            states = [self.sequence_states(part) for part in batch.passages]
            keys = self.project(torch.cat(states)) if states else query[:0]
        targets = torch.cat([part.targets for part in batch.gen])
        ntp = self.ntp_loss(hidden, targets, count=ntp_count)
        nsp, stats = self.nsp_loss(query, keys, batch, count=nsp_count)
        return CoSupervisionOutput(ntp + self.nsp.weight * nsp if self.nsp.weight else ntp, ntp, nsp, stats)

    def ntp_loss(self, hidden: Tensor, targets: Tensor, *, count: int | None = None) -> Tensor:
        """Next token prediction of supervised rows (n, D), which `gen_rows` gives, and their targets (n,)."""
        head = _head(self.gen)
        return self.criterion.ntp(hidden, head.weight, targets, bias=head.bias, count=count)

    def nsp_loss(
        self, query: Tensor, keys: Tensor, batch: CoSupervisionBatch, *, count: int | None = None
    ) -> tuple[Tensor, Stats | None]:
        """Next sequence prediction of all queries (N, D) of a step against all its passages (M, D), and its statistics.

        Without queries it is a constant 0.
        """
        if not len(query):
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
                return_stats=True,
            )

    def nsp_gradient(self) -> AbstractContextManager[Any]:
        """Without gradient where lambda is 0: then no graph is kept for NSP's sake."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.nsp.weight > 0)

    def hidden_states(self, pack: Pack) -> Tensor:
        """Gen's hidden states after the final norm, (T, D)."""
        return run_pack(self.gen.base_model, pack)

    def gen_rows(self, part: GenPack) -> tuple[Tensor, Tensor]:
        """What the losses read of a pack of Gen's: hidden states (n, D) of the supervised rows, queries (N, D)."""
        states = self._gen_states(part.pack)
        with self.nsp_gradient():
            query = self._at(states, part.query_rows, normalize=self.nsp.similarity == "cosine")
        return self._at(states, part.supervised_rows), query

    def query_embeddings(self, pack: Pack, rows: Tensor) -> Tensor:
        """Query embeddings (N, D) of the rows of [NSP] (N,) in a pack of Gen's."""
        return self._at(self._gen_states(pack), rows, normalize=self.nsp.similarity == "cosine")

    def logits(self, hidden: Tensor) -> Tensor:
        """Gen's logits (..., V) of hidden states (..., D), those that NTP is the cross-entropy of.

        z = softcap tanh(a / softcap)    a = scale W h + b    with the scale and softcap that Gen's configuration names.
        """
        head, ntp = _head(self.gen), self.criterion.ntp
        logits = linear(hidden, head.weight)
        if ntp.scale != 1:
            logits = logits * ntp.scale
        if head.bias is not None:
            logits = logits + head.bias
        return logits if ntp.softcap is None else ntp.softcap * torch.tanh(logits / ntp.softcap)

    def queries(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Query embeddings (N, D) from Gen's hidden states (T, D) at the rows of [NSP] (N,)."""
        return gather_last_hidden(hidden, rows, normalize=self.nsp.similarity == "cosine")

    def embed(self, pack: Pack) -> Tensor:
        """Sequence embeddings (S, D), one for each passage of a pack."""
        return self.project(self.sequence_states(pack))

    def sequence_states(self, pack: Pack) -> Tensor:
        """What Embseq itself makes of the passages of a pack, (S, D_e), to go through `project`."""
        model = self.gen.base_model if self.embseq is None else self.embseq
        unit = self.projection is None and self.nsp.similarity == "cosine"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_embseq):
            hidden = run_pack(model, pack, self._embseq_norm)
            return norm_rows(model, hidden, pack.last_rows, self._embseq_norm, normalize=unit)

    def project(self, states: Tensor) -> Tensor:
        """Sequence embeddings (S, D) from `sequence_states`: the same, but where the widths of the models differ."""
        if self.projection is None:
            return states
        embedding = self.projection(states)
        return nn.functional.normalize(embedding, dim=-1) if self.nsp.similarity == "cosine" else embedding

    def _gen_states(self, pack: Pack) -> Tensor:
        return run_pack(self.gen.base_model, pack, self._gen_norm)

    def _at(self, states: Tensor, rows: Tensor, *, normalize: bool = False) -> Tensor:
        return norm_rows(self.gen.base_model, states, rows, self._gen_norm, normalize=normalize)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.gen.device

    @property
    def vocabulary(self) -> int:
        """V, the rows of Gen's head."""
        return len(_head(self.gen).weight)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the template and the geometry: what decides every query and every embedding."""
        digest = hashlib.sha256(
            json.dumps([self.template.config.model_dump(), self.nsp.similarity], sort_keys=True).encode()
        )
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> Self:
        """Training mode; a frozen Embseq stays in evaluation mode, so that dropout does not move it."""
        super().train(mode)
        if self.freeze_embseq and self.embseq is not None:
            self.embseq.eval()
        return self

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each decoder layer's activations in the backward pass instead of keeping them."""
        for model in (self.gen, self.embseq):
            if model is not None and not (model is self.embseq and self.freeze_embseq):
                # transformers 5.10 knows it by the older name
                newer = getattr(model, "activation_checkpointing_enable", None)
                (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})

    @torch.no_grad()
    def _check_models(self, gen: str, embseq: str) -> None:
        """Compares a few tokens in a pack with what transformers makes of them alone; the models are as loaded.

        Raises:
            ValueError: a model mixes the sequences of a pack or cannot run on one, or `logits` is not all of its head.
        """
        hidden = check_packs(self.gen.base_model, f"Gen {gen!r}", self.device)
        if self._gen_norm is not None and not ends_in(self.gen.base_model, self._gen_norm, hidden):
            self._gen_norm = None
        ours, expected = self.logits(hidden), self.gen(input_ids=probe(self.device), use_cache=False).logits[0]
        ours, expected = (x - x.mean(dim=-1, keepdim=True) for x in (ours, expected))  # a shift changes no loss
        if not agree(ours, expected, self.gen.dtype):
            name = next(name for name, module in self.gen.named_modules() if module is _head(self.gen))
            raise ValueError(
                f"Gen {gen!r} ({type(self.gen).__name__}): its logits are not those of its head {name!r} with a bias, "
                "logit_scale, logits_scaling or final_logit_softcapping, the only ones that NTP knows: choose another "
                "model.gen"
            )
        if self.embseq is None:
            self._embseq_norm = self._gen_norm
            return
        hidden = check_packs(self.embseq, f"Embseq {embseq!r}", self.device)
        if self._embseq_norm is not None and not ends_in(self.embseq, self._embseq_norm, hidden):
            self._embseq_norm = None

    def _head_state(self) -> dict[str, Tensor]:
        """What belongs to neither model: the loss's learnable scale and the projection."""
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if name.startswith(("criterion.", "projection."))
        }


def read_description(folder: Path) -> dict[str, Any]:
    """The `cosup.json` of a checkpoint.

    Raises:
        ValueError: it is not there, is no JSON object, is of another format version, or is incomplete.
    """
    path = Path(folder) / "cosup.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is no co-supervised checkpoint (no cosup.json): expected a folder that `cosup-fast train` wrote"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description.get("format_version")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version!r}, this release reads {FORMAT_VERSION}")
    if missing := {"shared", "freeze_embseq", "dtype", "text", "nsp"} - set(description):
        raise ValueError(f"{path} is incomplete, it lacks {', '.join(sorted(missing))}")
    return description


def _head(gen: PreTrainedModel) -> nn.Linear:
    """The LM head: weight (V, D), and a bias (V,) or None."""
    head = gen.get_output_embeddings()
    if head is None:
        raise ValueError(f"{gen.name_or_path} ({type(gen).__name__}) has no LM head, so it cannot be Gen")
    return cast(nn.Linear, head)


def _logit_options(gen: PreTrainedModel) -> dict[str, Any]:
    """What a configuration says of the logits: logit_scale (Cohere), logits_scaling (Granite), a soft cap (Gemma)."""
    config = gen.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def _load(
    name: str, settings: ModelConfig, device: torch.device, *, layers: int | None = None, head: bool = True
) -> Any:
    source = resolve_model(name)
    dtype = getattr(torch, settings.dtype)
    config = AutoConfig.from_pretrained(source)
    stack = config.get_text_config()
    if layers is not None and layers > stack.num_hidden_layers:
        raise ValueError(
            f"{name} has {stack.num_hidden_layers} layers, {layers} were asked for: "
            "lower model.gen_layers or model.embseq_layers"
        )
    if layers is not None:
        stack.num_hidden_layers = layers
        if getattr(stack, "layer_types", None):
            stack.layer_types = stack.layer_types[:layers]
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise ValueError(
            f"{name} holds no *.safetensors; a pytorch_model.bin is a pickle, which may run code, and is never read: "
            "convert it with transformers, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    factory = AutoModelForCausalLM if head else AutoModel
    attention = choose_attention(settings.attention, device, dtype)
    kind: Any = factory._model_mapping.get(type(config), None)
    # What transformers' own sdpa lacks (Gemma 2's soft cap), packed_sdpa may have: `check_packs` finds out.
    backend = kind is not None and kind._supports_attention_backend and not kind._supports_sdpa
    loaded = "eager" if attention == PACKED_SDPA and backend else attention
    try:
        with quiet_transformers():
            model = factory.from_pretrained(
                source, config=config, dtype=dtype, attn_implementation=loaded, use_safetensors=True
            )
            model.config._attn_implementation = attention
            return model
    except (KeyError, ImportError, ValueError) as error:
        if attention not in str(error) and "attention" not in str(error).lower():
            raise
        raise unpackable(f"{'Gen' if head else 'Embseq'} {name!r}", attention, error) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no list of the weights left out on purpose: those of layers cut off, or of the head."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_template(model: ModelConfig, text: TextConfig) -> Template:
    """The template of two models, from their tokenizers and configurations alone: no weight is read."""
    return _load_template(model, text)[0]


def _load_template(model: ModelConfig, text: TextConfig) -> tuple[Template, bool]:
    """The template, and whether Gen has yet to learn some of its special tokens."""
    gen = resolve_model(model.gen)
    embseq = gen if model.shared or model.embseq is None else resolve_model(model.embseq)
    tokenizer = AutoTokenizer.from_pretrained(gen)
    new = add_special_tokens(tokenizer) > 0
    lengths = (positions(AutoConfig.from_pretrained(source)) for source in (gen, embseq))
    embseq_tokenizer = None if model.shared else AutoTokenizer.from_pretrained(embseq)
    return Template(text, tokenizer, embseq_tokenizer, **dict(zip(("max_length", "embseq_max_length"), lengths))), new


@torch.no_grad()
def _embed_special_tokens(gen: PreTrainedModel, template: Template) -> None:
    """Gives Gen rows for the special tokens: the means of their descriptions' rows."""
    tokenizer = template.tokenizer
    gen.resize_token_embeddings(max(len(tokenizer), len(_head(gen).weight)), mean_resizing=False)
    vocabulary = tokenizer.get_vocab()
    head = _head(gen)
    for rows in {gen.get_input_embeddings().weight, head.weight, head.bias} - {None}:
        for token, text in DESCRIPTIONS.items():
            rows[vocabulary[token]] = rows[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(dim=0)
