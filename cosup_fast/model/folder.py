"""A co-supervised model on disk: two Hugging Face folders, and what joins them.

gen/ embseq/         configuration, safetensors, tokenizer; of a model with adapters these alone; a Gen that was trained
                     without an Embseq stands alone
heads.safetensors    what belongs to neither model: the projection, a learnt temperature
cosup.json           the template, the geometry of NSP, and where the weights under adapters come from
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from cosup_fast.config.model import Attention, ModelConfig, NSPConfig, NTPConfig
from cosup_fast.data.strict import first_problem
from cosup_fast.data.template import Template, TextConfig
from cosup_fast.files import naming, read_object, usual_mode
from cosup_fast.model.adapters import WEIGHTS as ADAPTER_WEIGHTS
from cosup_fast.model.adapters import adapter_state, has_adapters, save_adapter_config
from cosup_fast.model.loading import Base, check_vocabulary, embed_special_tokens, load_language_model, load_template
from cosup_fast.model.pretrained import quiet_transformers

FORMAT_VERSION = 1
HEADS = "heads.safetensors"


class Changes(NamedTuple):
    """Settings in place of those that a checkpoint was saved with; with `nsp.weight` 0 its Embseq is not loaded."""

    text: TextConfig
    nsp: NSPConfig
    ntp: NTPConfig
    freeze_embseq: bool


class _Description(BaseModel):
    """The form of a `cosup.json`."""

    model_config = ConfigDict(strict=True)

    shared: bool
    has_embseq: bool = True
    freeze_embseq: bool
    dtype: Literal["float32", "bfloat16", "float64"]
    text: TextConfig
    nsp: NSPConfig
    ntp: NTPConfig = NTPConfig()
    adapters: dict[Literal["gen", "embseq"], Base] = {}


class Stored(Protocol):
    """What of a co-supervised model goes into a folder."""

    embseq: PreTrainedModel | None
    template: Template
    nsp: NSPConfig
    ntp: NTPConfig
    freeze_embseq: bool
    has_embseq: bool
    bases: dict[str, Base]
    sharded: bool

    @property
    def shared(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def parts(self) -> list[tuple[str, PreTrainedModel]]: ...
    def state_dict(self) -> dict[str, Any]: ...


class Parts(NamedTuple):
    """What a model is built from: what a folder holds, loaded."""

    gen: PreTrainedModel
    embseq: PreTrainedModel | None
    template: Template
    nsp: NSPConfig
    ntp: NTPConfig
    freeze_embseq: bool
    has_embseq: bool
    bases: dict[str, Base]
    """By "gen" and "embseq", the weights that adapters belong to; the adapters themselves are not loaded yet."""
    heads: dict[str, Tensor]


@contextmanager
def whole_weights(folder: Path) -> Iterator[None]:
    """Says which folder it was, where safetensors finds a file damaged."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged ({error}): use another copy or checkpoint") from None


def load_parts(folder: Path, device: torch.device, attention: Attention, changes: Changes | None = None) -> Parts:
    """The parts of the model in a folder, on a device.

    Raises:
        ValueError: see `CoSupervisionModel.load`.
    """
    description = read_description(folder)
    text, nsp, ntp, freeze_embseq = changes or Changes(
        TextConfig(**description["text"]),
        NSPConfig(**description["nsp"]),
        NTPConfig(**description.get("ntp", {})),
        description["freeze_embseq"],
    )
    has_embseq = description.get("has_embseq", True)
    if changes is not None and has_embseq and nsp.weight == 0:
        has_embseq = freeze_embseq = False
    settings = ModelConfig(
        gen=str(folder / "gen"),
        embseq=str(folder / "embseq") if has_embseq and not description["shared"] else None,
        shared=description["shared"] or not has_embseq,
        attention=attention,
        dtype=description["dtype"],
    )
    bases = {part: Base.model_validate(base) for part, base in description.get("adapters", {}).items()}
    if not has_embseq:
        bases.pop("embseq", None)
    bases = {name: base.found(folder / name) for name, base in bases.items()}
    template, _ = load_template(settings, text)

    def load(name: str, source: str, *, head: bool) -> Any:
        base = bases.get(name)
        if base is None:
            return load_language_model(source, settings, device, head=head)
        adapted = settings.model_copy(update={f"{name}_lora": base.lora})
        return load_language_model(base.name, adapted, device, layers=base.layers, head=head)

    gen = load("gen", settings.gen, head=True)
    check_vocabulary(gen, template.tokenizer, settings.gen, [*template.start, template.eos])
    if "gen" in bases and bases["gen"].new_tokens:
        embed_special_tokens(gen, template)
    gen.config.pad_token_id = template.pad
    embseq = None if settings.embseq is None else load("embseq", settings.embseq, head=False)
    if embseq is not None:
        around = [*template.embseq_start, *template.embseq_end]
        check_vocabulary(embseq, template.embseq_tokenizer, str(settings.embseq), around)
    heads = folder / HEADS
    if not heads.is_file():
        raise ValueError(f"{folder} is incomplete: {HEADS} is missing")
    return Parts(gen, embseq, template, nsp, ntp, freeze_embseq, has_embseq, bases, load_file(heads))


def save_folder(model: Stored, folder: Path, *, weights: bool = True) -> None:
    """Writes a model into an existing or new folder.

    Args:
        model: the model.
        folder: where to.
        weights: with those files that `copied_weights` names; nobody else writes them then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers = {"gen": model.template.tokenizer, "embseq": model.template.embseq_tokenizer}
    dtype = str(model.dtype).removeprefix("torch.")
    with quiet_transformers():
        for name, part in model.parts():
            part.config.architectures = [type(part).__name__.removeprefix("FSDP")]
            part.config.dtype = dtype
            part.config.save_pretrained(folder / name)
            if has_adapters(part):
                save_adapter_config(part, folder / name)
            elif part.can_generate() and part.generation_config is not None:
                # `save_pretrained` refuses what `from_pretrained` accepts, such as a temperature that is not used.
                part.generation_config.to_json_file(folder / name / GENERATION_CONFIG_NAME)
            tokenizers[name].save_pretrained(folder / name)
    for name, tensors in copied_weights(model).items() if weights else ():
        save_file(tensors, folder / name, metadata={"format": "pt"})
        usual_mode(folder / name)
    save_file(heads_of(model), folder / HEADS)
    usual_mode(folder / HEADS)
    description = {
        "format_version": FORMAT_VERSION,
        "shared": model.shared,
        "has_embseq": model.has_embseq,
        "freeze_embseq": model.freeze_embseq,
        "dtype": dtype,
        "text": model.template.config.model_dump(),
        "nsp": model.nsp.model_dump(),
        "ntp": model.ntp.model_dump(),
    }
    if model.bases:
        description["adapters"] = {name: base.model_dump() for name, base in model.bases.items()}
    (folder / "cosup.json").write_text(json.dumps(description, indent=2) + "\n")


def check_saving(model: Stored) -> None:
    """Writes all of a model but its weights into a temporary folder: what cannot be saved is known before a step.

    Raises:
        ValueError: a configuration or a tokenizer cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with naming(Path(folder)):
                save_folder(model, Path(folder), weights=False)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"this model could be trained and not saved ({error}): use a copy whose configuration and tokenizer "
                "transformers can write"
            ) from error


def copied_weights(model: Stored, rank: int = 0, ranks: int = 1) -> dict[str, dict[str, Tensor]]:
    """Copies of the trained weights in the CPU's memory, by the file of the folder that they go into.

    Ranks that have shared them out share the writing, too: weights are gathered for it, so that every rank calls
    this. Of others, rank 0 writes everything.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, part in model.parts():
        if has_adapters(part):
            file, writers = f"{name}/{ADAPTER_WEIGHTS}", 1
            tensors = {f"base_model.model.{key}": x for key, x in adapter_state(part).items()}
        else:
            file, writers = f"{name}/model.safetensors", ranks if model.sharded else 1
            if writers > 1:
                file = f"{name}/model-{rank + 1:05d}-of-{ranks:05d}.safetensors"
            tied = {key for key, _ in part.named_parameters(remove_duplicate=False)}
            tensors = dict(part.named_parameters()) | {k: x for k, x in part.state_dict().items() if k not in tied}
        for i, (key, x) in enumerate(tensors.items()):
            whole = cast(Any, x).full_tensor() if hasattr(x, "full_tensor") else x
            if i % writers == rank:
                found.setdefault(file, {})[key] = whole.detach().to("cpu", copy=True).contiguous()
    return found


def read_description(folder: Path) -> dict[str, Any]:
    """The `cosup.json` of a folder.

    Raises:
        ValueError: it is not there, is not a JSON object, is of another format version, or is incomplete.
    """
    path = folder / "cosup.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a co-supervised checkpoint (no cosup.json): expected one that `cosup-fast train` wrote, "
            "such as RUN/checkpoints/step-000100"
        )
    description = read_object(path)
    if (version := description.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version!r}, this release reads {FORMAT_VERSION}")
    if missing := {"shared", "freeze_embseq", "dtype", "text", "nsp"} - set(description):
        raise ValueError(f"{path} is incomplete, it lacks {', '.join(sorted(missing))}")
    try:
        _Description.model_validate(description)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {first_problem(error)}") from None
    return description


def weights_digest(model: nn.Module, about: str = "") -> str:
    """SHA-256 of every weight with its name, and of what else decides what a model computes."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def heads_of(model: Stored) -> dict[str, Tensor]:
    """What belongs to neither model: the loss's learnable scale and the projection."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(("criterion.", "projection."))
    }


def check_heads(path: Path, heads: dict[str, Tensor], made: dict[str, Tensor]) -> None:
    """Refuses a `heads.safetensors` with other tensors than `heads_of` a model has.

    Raises:
        ValueError: naming both.
    """
    there, here = ({name: tuple(x.shape) for name, x in sorted(one.items())} for one in (heads, made))
    if there != here:
        raise ValueError(f"{path} holds {there or 'nothing'}, expected {here or 'nothing'}: use another copy")
