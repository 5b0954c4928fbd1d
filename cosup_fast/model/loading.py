"""The two language models and their template, from folders or the hub: what is asked for, checked, and read.

Weights are safetensors alone; nothing that could run code is read or fetched.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from pydantic import BaseModel, field_validator
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from cosup_fast.config.model import LoRAConfig, ModelConfig
from cosup_fast.data.sources import resolve_model
from cosup_fast.data.template import DESCRIPTIONS, Template, TextConfig, add_special_tokens
from cosup_fast.environment import no_downloaded_kernels
from cosup_fast.files import sha256
from cosup_fast.model.adapters import check_targets, keep_layout, quantization
from cosup_fast.model.attention import PACKED, choose_attention
from cosup_fast.model.backbone import positions, unpackable
from cosup_fast.model.pretrained import quiet_transformers, read_config, read_model, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Base(BaseModel):
    """Where the weights under adapters come from; a checkpoint holds this and the adapters."""

    name: str
    layers: int | None
    lora: LoRAConfig
    sha256: dict[str, str]  # of the safetensors files
    new_tokens: bool = False  # whether rows for the special tokens are added

    @field_validator("lora")
    @classmethod
    def _there(cls, lora: LoRAConfig) -> LoRAConfig:
        if not lora.rank:
            raise ValueError("expected adapters of a rank of at least 1, found rank 0")
        return lora

    @classmethod
    def of(cls, name: str, layers: int | None, lora: LoRAConfig, new_tokens: bool = False) -> Self:
        """That of a model by its name or folder, which is then found from any working directory."""
        name = str(Path(name).resolve()) if Path(resolve_model(name)) == Path(name) and Path(name).is_dir() else name
        return cls(name=name, layers=layers, lora=lora, sha256=_digests(name), new_tokens=new_tokens)

    def found(self, folder: Path) -> Self:
        """This base where its weights are now: at its name, or at `COSUP_BASE_GEN` or `COSUP_BASE_EMBSEQ`.

        Args:
            folder: with the adapters, named gen or embseq.

        Raises:
            ValueError: the weights are missing, or are not those that the adapters were trained over.
        """
        variable = f"COSUP_BASE_{folder.name.upper()}"
        base = self.model_copy(update={"name": os.environ.get(variable) or self.name})
        remedy = f"set {variable} to the folder that holds them"
        try:
            there = _digests(base.name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the weights under the adapters in {folder} are not at {base.name!r} ({_line(error)}): {remedy}"
            ) from None
        if there != self.sha256:
            raise ValueError(
                f"the adapters in {folder} belong to other weights of {base.name!r} than there are now "
                f"(sha256 {_first(self.sha256)} then, {_first(there)} now): restore them, or {remedy}"
            )
        return base


def keep_layers(config: Any, layers: int, name: str) -> None:
    """Cuts the configuration of a model, in place, down to its first decoder layers.

    Raises:
        ValueError: it has fewer.
    """
    stack = config.get_text_config()
    if layers > stack.num_hidden_layers:
        raise ValueError(
            f"{name} has {stack.num_hidden_layers} layers, {layers} were asked for: "
            "lower model.gen_layers or model.embseq_layers"
        )
    stack.num_hidden_layers = layers
    if getattr(stack, "layer_types", None):
        stack.layer_types = stack.layer_types[:layers]


def load_language_model(
    name: str, settings: ModelConfig, device: torch.device, *, layers: int | None = None, head: bool = True
) -> Any:
    """A pretrained causal LM with its head, as Gen, or without, as Embseq.

    Args:
        name: a prepared name, a local folder or a Hugging Face name.
        settings: dtype, attention, and whether the weights are kept in 4 bits.
        device: where 4-bit weights go at once; "meta": no weights are read.
        layers: keep only the first ones.
        head: with the head.

    Raises:
        ValueError: what `CoSupervisionModel.from_pretrained` says of a single model.
    """
    dtype = getattr(torch, settings.dtype)
    config = read_config(name)
    if layers is not None:
        keep_layers(config, layers, name)
    factory = AutoModelForCausalLM if head else AutoModel
    field = "gen_lora" if head else "embseq_lora"
    options: dict[str, Any] = {}
    if (quantized := quantization(getattr(settings, field), f"model.{field}", dtype)) is not None:
        options = {"quantization_config": quantized, "device_map": {"": device}}
    attention = choose_attention(settings.attention, device)
    kind: Any = factory._model_mapping.get(type(config), None)
    # What transformers' own sdpa lacks (Gemma 2's soft cap), packed_sdpa may have: `check_packs` finds out.
    backend = kind is not None and kind._supports_attention_backend and not kind._supports_sdpa
    loaded = "eager" if attention in PACKED and backend else attention
    try:
        if device.type == "meta":
            with quiet_transformers(), no_downloaded_kernels(), device:
                model = factory.from_config(config, dtype=dtype, attn_implementation=loaded, trust_remote_code=False)
        else:
            options |= {"config": config, "dtype": dtype, "attn_implementation": loaded}
            model = read_model(factory, name, cut=layers is not None, **options)
        model.config._attn_implementation = attention
    except (KeyError, ImportError, ValueError) as error:
        if attention not in str(error) and "attention" not in str(error).lower():
            raise
        raise unpackable(f"{'Gen' if head else 'Embseq'} {name!r}", attention, error) from error
    if quantized is not None:
        keep_layout(model)
    return model


def load_template(model: ModelConfig, text: TextConfig) -> tuple[Template, bool]:
    """The template of two models, and whether Gen has yet to learn some of its special tokens; no weight is read."""
    gen = resolve_model(model.gen)
    embseq = gen if model.shared or model.embseq is None else resolve_model(model.embseq)
    lengths = [positions(read_config(source)) for source in (gen, embseq)]
    tokenizer = read_tokenizer(gen)
    new = add_special_tokens(tokenizer) > 0
    embseq_tokenizer = None if model.shared else read_tokenizer(embseq)
    return Template(text, tokenizer, embseq_tokenizer, **dict(zip(("max_length", "embseq_max_length"), lengths))), new


def check_vocabulary(model: PreTrainedModel, tokenizer: Any, name: str, used: Iterable[int]) -> None:
    """Refuses a tokenizer that gives a model tokens which it has no embedding of.

    Args:
        model: before rows for the special tokens are added.
        tokenizer: the tokenizer.
        name: of the model, for the error.
        used: tokens that are put around texts. Other special tokens are never made of a text.

    Raises:
        ValueError: naming the first such token.
    """
    rows = len(cast(Any, model.get_input_embeddings()).weight)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} - set(used)
    beyond = [token for token in {*tokenizer.get_vocab().values(), *used} - special if token >= rows]
    if beyond:
        token = min(beyond)
        raise ValueError(
            f"the tokenizer of {name!r} has the token {tokenizer.convert_ids_to_tokens(token)!r} with the id {token}, "
            f"and the model has {rows} embeddings: use the tokenizer that the model was trained with"
        )


def lm_head(gen: PreTrainedModel) -> nn.Linear:
    """The LM head: weight (V, D), and a bias (V,) or None."""
    head = gen.get_output_embeddings()
    if head is None:
        raise ValueError(f"{gen.name_or_path} ({type(gen).__name__}) has no LM head, so it cannot be Gen")
    return cast(nn.Linear, head)


def logit_options(gen: PreTrainedModel) -> dict[str, Any]:
    """What a configuration says of the logits: logit_scale (Cohere), logits_scaling (Granite), a soft cap (Gemma)."""
    config = gen.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


@torch.no_grad()
def embed_special_tokens(gen: PreTrainedModel, template: Template) -> None:
    """Gives Gen rows for the special tokens: the means of their descriptions' rows."""
    tokenizer = template.tokenizer
    vocabulary = tokenizer.get_vocab()
    gen.resize_token_embeddings(max(max(vocabulary.values()) + 1, len(lm_head(gen).weight)), mean_resizing=False)
    head = lm_head(gen)
    for rows in {gen.get_input_embeddings().weight, head.weight, head.bias} - {None}:
        for token, text in DESCRIPTIONS.items():
            rows[vocabulary[token]] = rows[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(dim=0)


def check_adapters(model: ModelConfig) -> None:
    """Refuses adapters that cannot be, before any weight is read."""
    for field, name in (("gen_lora", model.gen), ("embseq_lora", model.embseq or model.gen)):
        lora: LoRAConfig = getattr(model, field)
        quantization(lora, f"model.{field}", getattr(torch, model.dtype))
        if lora.rank:
            check_targets(lora, f"model.{field}", read_config(name))


def _digests(name: str) -> dict[str, str]:
    """SHA-256 of the weights of a model by file name."""
    folder = Path(str(cached_file(resolve_model(name), "config.json"))).parent
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def _first(digests: dict[str, str]) -> str:
    return f"{min(digests.values(), default='none')[:12]}…"


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
