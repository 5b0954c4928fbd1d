"""A language model without its head, over packs: hidden states at chosen rows, the final norm computed there alone.

Most models end in an RMSNorm, y = x rsqrt(mean(x^2) + eps) w. A loss reads a few rows of a pack: the supervised ones,
those of [NSP], the last of each passage. So a backbone runs here without that norm, and `norm_rows` gathers the rows
and normalises them in one pass, in fp32 and rounded once. Any other final norm stays where it is.

Shapes: T tokens of a pack, R rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cosup_fast.data.packing import Pack
from cosup_fast.functional import gather_last_hidden
from cosup_fast.model.attention import PACKED, PACKED_SDPA, SequenceLengths, attending, recorded_windows

# Two sequences of a few tokens that every vocabulary has, the second to be compared alone and after the first.
_BEFORE, _PROBE = [40, 41, 42, 43, 44], [30, 31, 32, 33]

# What the last norm of a decoder is called in transformers.
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class FinalNorm(NamedTuple):
    """y = x rsqrt(mean(x^2) + eps) (offset + weight), with the weight of `backbone.<name>`; Gemma's offset is 1."""

    name: str
    eps: float
    offset: float


def run_pack(backbone: Any, pack: Pack, without: FinalNorm | None = None) -> Tensor:
    """The hidden states (T, D) of a pack; `without` the final norm, those that go into it."""
    lengths: dict[str, Any] = (
        {"sequence_lengths": SequenceLengths(pack.lengths, pack.cu_seqlens)}
        if backbone.config._attn_implementation in PACKED
        else {
            "cu_seq_lens_q": pack.cu_seqlens,
            "cu_seq_lens_k": pack.cu_seqlens,
            "max_length_q": max(pack.lengths),
            "max_length_k": max(pack.lengths),
        }
    )
    # Inside a sharded model its weights are whole already; its hooks would gather and count them once more.
    forward = backbone.forward if hasattr(backbone, "run_inside") else backbone
    with bypassed(backbone, without):
        return forward(
            input_ids=pack.input_ids[None], position_ids=pack.position_ids[None], use_cache=False, **lengths
        ).last_hidden_state[0]


def norm_rows(
    backbone: nn.Module,
    hidden: Tensor,  # (T, D)
    rows: Tensor,  # (R,)
    norm: FinalNorm | None,
    *,
    normalize: bool = False,
) -> Tensor:  # (R, D)
    """The rows of what `run_pack` gave, after the final norm and, if asked, divided by their L2 norm."""
    if norm is None:
        return gather_last_hidden(hidden, rows, normalize=normalize)
    return gather_last_hidden(hidden, rows, norm_weight=_weight(backbone, norm), eps=norm.eps, normalize=normalize)


@torch.no_grad()
def find_final_norm(backbone: nn.Module) -> FinalNorm | None:
    """The RMSNorm that a backbone ends in, recognised by what it does to a few rows; None if it ends in another."""
    for name in _NORMS:
        norm: Any = getattr(backbone, name, None)
        weight: Any = getattr(norm, "weight", None)
        if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:  # absent, or without values to look at
            continue
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not isinstance(eps, float) or weight.ndim != 1 or getattr(norm, "bias", None) is not None:
            continue
        x = torch.linspace(-1, 2, 3 * len(weight), device=weight.device).sin().view(3, -1).to(weight.dtype)
        x = x * torch.tensor([[1.0], [eps**0.5], [1e3]], dtype=x.dtype, device=x.device)  # the second row shows eps
        for offset in (0.0, 1.0):
            found = FinalNorm(name, eps, offset)
            if agree(norm_rows(backbone, x, torch.arange(3, device=x.device), found), norm(x), weight.dtype):
                return found
    return None


def check_packs(backbone: Any, name: str, device: torch.device) -> Tensor:
    """Compares a few tokens in a pack with what transformers' eager attention makes of them; returns that, (T, D).

    Raises:
        ValueError: the model cannot run on packs, or mixes their sequences.
    """

    def packed(*sequences: list[int]) -> Tensor:
        return run_pack(backbone, Pack.of(sequences).to(device))[-len(_PROBE) :]

    expected = alone(backbone, probe(device))[0]
    try:
        with recorded_windows() as windows:
            after = packed(_BEFORE, _PROBE)
        lost = {window for window in windows.asked - windows.applied if window is not None}
        if lost and min(lost) < positions(backbone.config):
            raise ValueError(f"its layers see {min(lost)} tokens through a mask alone, and packs have no mask")
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise unpackable(name, backbone.config._attn_implementation, error) from error
    if not agree(after, expected, backbone.dtype):
        raise ValueError(
            f"{name} ({type(backbone).__name__}) mixes the sequences of a pack, through recurrent or convolutional "
            "layers or an attention of its own that takes no packs: choose another model"
            if agree(packed(_PROBE), expected, backbone.dtype)
            else f"{name} ({type(backbone).__name__}) reads a sequence of a pack otherwise than alone: its attention "
            "is bidirectional, or its positions do not count from 0; choose a causal language model"
        )
    return expected


def alone(backbone: Any, ids: Tensor) -> Tensor:
    """The hidden states (N, T, D) of token ids (N, T) by transformers' own eager attention, which is what is right."""
    with attending(backbone, "eager"):
        return backbone(input_ids=ids, use_cache=False).last_hidden_state


def ends_in(backbone: Any, norm: FinalNorm, expected: Tensor) -> bool:
    """Whether the norm really is a backbone's last operation, given the hidden states (T, D) of `probe` alone."""
    pack = Pack.of([_PROBE]).to(expected.device)
    hidden = run_pack(backbone, pack, norm)
    return agree(norm_rows(backbone, hidden, pack.position_ids, norm), expected, backbone.dtype)


def positions(config: Any) -> int:
    """How many tokens a sequence may have.

    With rotary frequencies that change where a sequence passes the length of pretraining (longrope), no more than that
    length: the frequencies would be those of the longest sequence of a pack for its neighbours too, and of keys in a
    cache that were made with others.
    """
    stack = config.get_text_config()
    ropes: dict[str, Any] = getattr(stack, "rope_parameters", None) or {}
    each = [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict) and rope.get("rope_type") == "longrope"]
    return min([stack.max_position_embeddings, *(rope["original_max_position_embeddings"] for rope in each)])


def probe(device: torch.device) -> Tensor:
    """A few tokens, (1, T)."""
    return torch.tensor([_PROBE], device=device)


def agree(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results differ by no more than the rounding of a deep model; NaN is not a difference."""
    # 30 layers in bf16 are 2 eps away from fp32; products of fp32 may be rounded to TF32, 11 bits.
    tolerance = 10 * max(torch.finfo(dtype).eps, 2**-11)
    return not (ours.float() - expected.float()).norm() > tolerance * expected.float().norm()


def unpackable(name: str, attention: str, error: Exception) -> ValueError:
    """What a model that cannot run on packs is refused with."""
    reason = str(error).split(". ")[0].rstrip(".")
    other = PACKED_SDPA if attention not in PACKED else "flash_attention_2 where flash-attn runs"
    return ValueError(
        f"{name} has no attention that packs can use: {reason} ({type(error).__name__} with {attention}); choose "
        f"another model, or model.attention={other}"
    )


def _weight(backbone: nn.Module, norm: FinalNorm) -> Tensor:
    weight = getattr(backbone, norm.name).weight
    return weight + norm.offset if norm.offset else weight


@contextmanager
def bypassed(backbone: nn.Module, norm: FinalNorm | None) -> Iterator[None]:
    """The backbone with the identity in place of its final norm."""
    if norm is None:
        yield
        return
    module = getattr(backbone, norm.name)
    setattr(backbone, norm.name, nn.Identity())
    try:
        yield
    finally:
        setattr(backbone, norm.name, module)
