"""Reading a pretrained configuration, tokenizer or model: whole or refused, and never code that came with it.

Every such call of the package is in this file. `trust_remote_code=False` keeps transformers from asking on standard
input whether to run a model's own Python, weights come from safetensors alone, and a tensor that the model needs and
the files lack is an error instead of a random initialisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from cosup_fast.data.sources import resolve_model
from cosup_fast.environment import no_downloaded_kernels
from cosup_fast.files import read_object

MOST_LAYERS = 4096
"""More than any model has."""
NAMED = 4
"""As many tensors as an error names."""
_POOLER = "pooler."  # not needed: sequence embeddings are hidden states
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


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


def read_config(name: str | Path) -> Any:
    """The configuration of a model.

    Args:
        name: a prepared name, a local folder or a Hugging Face name.

    Raises:
        ValueError: it is missing or damaged, or transformers knows its architecture only through code that it brings.
    """
    config = _read(AutoConfig, name, "configuration")
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:  # each is made, one after the other, before any weight is read
        raise ValueError(
            f"the configuration of {str(name)!r} asks for num_hidden_layers={layers}, above {MOST_LAYERS:,}: use a "
            "whole copy of the model"
        )
    return config


def read_tokenizer(name: str | Path, **options: Any) -> Any:
    """The tokenizer of a model; `options` are those of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: it is missing or damaged, or is code that the model brings.
    """
    return _read(AutoTokenizer, name, "tokenizer", **options)


def read_model(factory: Any, name: str | Path, *, cut: bool = False, **options: Any) -> Any:
    """A model with all of its weights.

    Args:
        factory: one of transformers' Auto classes.
        name: a prepared name, a local folder or a Hugging Face name.
        cut: layers beyond those of its configuration are left out on purpose.
        options: for `from_pretrained`.

    Raises:
        ValueError: the weights are damaged, of other shapes, not safetensors, quantized in a way that the configuration
            does not say, or some of them are missing (all of them under names with a prefix, say); there are layers
            that the configuration lacks, or a head of its own where it ties the head to the embeddings; or the
            architecture is code of the model's.
    """
    source = resolve_model(str(name))
    if Path(source).is_dir():
        check_weight_files(Path(source), str(name))
        _check_quantized(Path(source), str(name), options.get("config"))
    with _named("weights", name), quiet_transformers(), no_downloaded_kernels():
        model, found = factory.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    unused = (_POOLER,) if factory is AutoModel else ()
    _check_complete(str(name), found, unused)
    if not cut:
        _check_all_layers(str(name), model, found["unexpected_keys"])
    _check_tied(str(name), model)
    return model


@contextmanager
def complete_models(name: str) -> Iterator[None]:
    """Refuses incomplete models that another library loads through transformers, which would fill them at random.

    Args:
        name: as errors call what is loaded.

    Raises:
        ValueError: from inside, as of `read_model`.
    """
    original = PreTrainedModel.__dict__["from_pretrained"]

    def checked(kind: type[PreTrainedModel], *given: Any, **options: Any) -> Any:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = original.__get__(None, kind)(*given, **options)
        _check_complete(name, found, (_POOLER,))
        return model

    PreTrainedModel.from_pretrained = classmethod(checked)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original


def check_weight_files(folder: Path, name: str) -> None:
    """Refuses a folder whose weights are not safetensors inside it.

    Raises:
        ValueError: it has none, or its index names a pickle, a file elsewhere, or one that is not there.
    """
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{name} holds no *.safetensors; a pytorch_model.bin is a pickle, which may run code, and is never read: "
            "convert it with transformers, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} holds adapters over another model, adapter_config.json says: name that model, or merge the "
            "adapters into it with peft, merge_and_unload"
        )
    path = folder / "model.safetensors.index.json"
    if not path.is_file() or (folder / "model.safetensors").is_file():
        return
    try:
        files = set(read_object(path, ["weight_map"])["weight_map"].values())
    except (TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: its weight_map is not one: use another copy") from None
    for file in sorted(files, key=str):
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {file!r}: every entry of its weight_map has to be a *.safetensors file beside it"
            )
        if not (folder / file).is_file():
            raise ValueError(f"{path} names {file}, which is missing: fetch the whole model again")


def _check_quantized(folder: Path, name: str, config: Any) -> None:
    """Refuses weights in integers that the configuration does not explain: as they are, they lack their scales."""
    with _named("weights", name):
        integers = {key: kind for path in sorted(folder.glob("*.safetensors")) for key, kind in _integers(path)}
    if integers and getattr(config or read_config(name), "quantization_config", None) is None:
        key, kind = next(iter(integers.items()))
        raise ValueError(
            f"{name!r} holds {key} in integers ({kind}), and its config.json has no quantization_config: use weights "
            "in floating point, or the configuration that says how they were quantized"
        )


def _integers(path: Path) -> Iterator[tuple[str, str]]:
    """The weights of a safetensors file that are integers, with their types."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # it is no dictionary
            if key.endswith(".weight") and (kind := file.get_slice(key).get_dtype())[0] in "IU":
                yield key, kind


def _read(factory: Any, name: str | Path, what: str, **options: Any) -> Any:
    source = resolve_model(str(name))
    with _named(what, name), quiet_transformers():
        return factory.from_pretrained(source, trust_remote_code=False, **options)


@contextmanager
def _named(what: str, name: str | Path) -> Iterator[None]:
    """Names the model in whatever error transformers and the libraries under it raise for a damaged file.

    Raises:
        ValueError: in place of any error but that of memory, and of packages that are missing.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if "out of memory" in reason or "can't allocate memory" in reason:
            raise
        if "trust_remote_code" in reason:
            raise ValueError(
                f"the {what} of {str(name)!r} is Python code that comes with the model, which is never run: use a "
                "model whose architecture transformers has itself"
            ) from None
        kind = "" if isinstance(error, OSError | ValueError | SafetensorError) else f"{type(error).__name__}: "
        raise ValueError(
            f"the {what} of {str(name)!r} cannot be read ({kind}{reason}): use a whole copy of a model that this "
            "release of transformers knows"
        ) from error


def _check_complete(name: str, found: dict[str, Any], unused: tuple[str, ...]) -> None:
    """Refuses what `from_pretrained` would have filled with random numbers."""
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(unused))
    resized: list[tuple[str, Any, Any]] = sorted(found.get("mismatched_keys") or ())
    if resized:
        key, there, here = resized[0]
        raise ValueError(
            f"{name!r} holds {len(resized)} tensors of other shapes than its config.json asks for, such as {key}: "
            f"{tuple(there)} in the file, {tuple(here)} in the model; use the configuration that the weights belong to"
        )
    if missing:
        unexpected = sorted(found["unexpected_keys"])
        raise ValueError(
            f"{name!r} lacks {_names(missing)}, which would be left random"
            + (f"; it holds {_names(unexpected)} instead" if unexpected else "")
            + ": use a complete copy of the model, of the kind that its config.json describes"
        )


def _check_all_layers(name: str, model: Any, unexpected: Iterable[str]) -> None:
    """Refuses tensors that are like those of the model's layers but have no place in it."""
    kinds = {_NUMBER.sub("#", key) for key in model.state_dict()}
    kinds = {kind for kind in kinds if "#" in kind}
    beyond = sorted(
        key
        for key in unexpected
        if any(kind == (found := _NUMBER.sub("#", key)) or f".{found}".endswith(f".{kind}") for kind in kinds)
    )
    if beyond:
        raise ValueError(
            f"{name!r} also holds {_names(beyond)}, for which its config.json has no layer: use the configuration that "
            "the weights belong to, or set model.gen_layers or model.embseq_layers to keep the first layers alone"
        )


def _check_tied(name: str, model: Any) -> None:
    """Refuses a head that would be lost: whatever resizes the embeddings ties it to them."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    if head.weight is not embeddings.weight and not torch.equal(head.weight, embeddings.weight):
        raise ValueError(
            f"{name!r} holds a head that differs from its embeddings, and its config.json says "
            "tie_word_embeddings=true: set it to false, or remove the head's tensor"
        )


def _names(keys: list[str]) -> str:
    rest = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"{len(keys)} tensors ({', '.join(keys[:NAMED])}{rest})" if len(keys) > 1 else keys[0]
