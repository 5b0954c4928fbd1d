"""Low-rank adapters over a language model, LoRA and QLoRA: peft's layers, put into the model in place.

    y = W x + (alpha / rank) B A x    A (rank, in), B (out, rank), B = 0 at first; W stays as it is, in 4 bits or not

Rows of the embeddings and of the head that belong to new tokens are trained whole: no adapter could teach a token that
the model has never seen. Sources: Hu et al. 2022, arXiv 2106.09685; Dettmers et al. 2023, arXiv 2305.14314.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cosup_fast.config.model import LoRAConfig
from cosup_fast.environment import no_downloaded_kernels

WEIGHTS = "adapter_model.safetensors"
_NAME = "default"


def quantization(config: LoRAConfig, field: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What `from_pretrained` takes for 4-bit weights, multiplied in `dtype`.

    Raises:
        ValueError: they are asked for and bitsandbytes is not installed.
    """
    if config.quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{field}.quantize={config.quantize} needs the package bitsandbytes, which is not installed: "
            f"pip install 'cosup-fast[gpu]', or set {field}.quantize=null"
        )
    with no_downloaded_kernels():
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=config.quantize, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip


def keep_layout(model: nn.Module) -> None:
    """Forbids 4-bit weights the layout that bitsandbytes gives them on some CPUs, which has no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def check_targets(config: LoRAConfig, field: str, model_config: Any) -> None:
    """Refuses targets that a model of this configuration does not have, before its weights are read.

    The experts of a mixture are fused into one parameter of three dimensions, not a linear layer: adapters over
    it could be trained, but neither merged nor loaded again.

    Raises:
        ValueError: naming the field, the target and what there is, or the experts.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)}
    fused = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name}
    if fused and not config.targets:
        attention = sorted({name.rpartition(".")[2] for name in linear if "attn" in name or "attention" in name})
        raise ValueError(
            f"{field}.rank={config.rank}: {type(model).__name__} is a mixture of experts, whose fused weights "
            f"({', '.join(sorted(fused))}) adapters cannot be loaded over: name the layers to adapt, "
            f"{field}.targets=[{','.join(attention)}]"
        )
    for target in config.targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"{field}.targets: {type(model).__name__} has no linear layer {target!r}; it has {', '.join(known)}"
            )


def add_adapters(model: Any, config: LoRAConfig, tokens: Sequence[int] = ()) -> None:
    """Freezes a model and puts trainable adapters into it, with trainable rows for `tokens`."""
    rows: dict[str, list[int]] = {}
    if tokens:
        parts = [model.get_input_embeddings(), model.get_output_embeddings()]
        distinct = parts[: 1 if parts[1] is None or parts[0].weight is parts[1].weight else 2]
        rows = {_name_of(model, part): sorted(tokens) for part in distinct}
    with no_downloaded_kernels(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that GPT-2's weights are transposed, which peft then minds
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(
            LoraConfig(
                r=config.rank,
                lora_alpha=cast(int, 2 * config.rank if config.alpha is None else config.alpha),  # a float will do
                lora_dropout=config.dropout,
                target_modules="all-linear" if config.targets is None else config.targets,
                trainable_token_indices=rows or None,
            ),
            model,
            _NAME,
        )
    for p in model.parameters():
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):  # steps would be lost in rounding
            p.data = p.data.float()


def has_adapters(model: Any) -> bool:
    """Whether `add_adapters` was here."""
    return hasattr(model, "peft_config")


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The trained tensors by peft's names."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=_NAME)


def save_adapter_config(model: Any, folder: Path) -> None:
    """Writes adapter_config.json as peft does; adapter_model.safetensors holds `adapter_state` under a prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[_NAME].save_pretrained(str(folder))


def load_adapters(model: Any, folder: Path) -> None:
    """Fills the adapters of a model, which are there already, from a checkpoint's adapter_model.safetensors.

    Raises:
        ValueError: the file is missing, or holds other tensors.
    """
    from peft import set_peft_model_state_dict

    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} is incomplete: {WEIGHTS} is missing")
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}
    expected = adapter_state(model)
    if wrong := [n for n in expected.keys() | saved.keys() if _shape(expected, n) != _shape(saved, n)]:
        raise ValueError(f"{path} holds other adapters than its checkpoint describes: {min(wrong)} is not the same")
    set_peft_model_state_dict(model, saved, _NAME)


@torch.no_grad()
def merge_adapters(model: Any) -> None:
    """Folds the adapters into the weights; what is left is a plain model. 4-bit weights become those of its dtype."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    if getattr(model, "is_quantized", False):
        with no_downloaded_kernels():
            model.dequantize()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            base.weight.data += cast(Any, layer).get_delta_weight(_NAME).to(base.weight.device)
            model.set_submodule(name, base)
        elif isinstance(layer, TrainableTokensWrapper):
            token_adapter: Any = layer.token_adapter
            base = token_adapter.get_base_layer()
            if token_adapter.tied_adapter is None:
                rows = torch.tensor(token_adapter.token_indices[_NAME], device=base.weight.device)
                base.weight.data[rows] = token_adapter.trainable_tokens_delta[_NAME].to(base.weight)
            model.set_submodule(name, base)
    del model.peft_config


def unwrapped(module: Any) -> Any:
    """The layer itself under a wrapper that trains some of its rows."""
    adapter = getattr(module, "token_adapter", None)
    return module if adapter is None else adapter.get_base_layer()


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer
