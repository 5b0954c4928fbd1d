"""Models are checked by trying them: a few tokens in a pack must give what transformers makes of them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cosup_fast.model.backbone import FinalNorm, agree, check_packs, ends_in, probe
from cosup_fast.model.loading import lm_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Tried(Protocol):
    """The parts of a `CoSupervisionModel` that a trial runs or changes."""

    gen: PreTrainedModel
    embseq: PreTrainedModel | None
    gen_norm: FinalNorm | None
    embseq_norm: FinalNorm | None

    @property
    def device(self) -> torch.device: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


@torch.no_grad()
def check_model(model: Tried, gen: str, embseq: str) -> None:
    """Tries a model as it was loaded, and forgets a final norm that is not its last operation.

    Args:
        model: on the device where it will run; on "meta" nothing is tried.
        gen, embseq: their names, for errors.

    Raises:
        ValueError: a model mixes the sequences of a pack or cannot run on one, or `logits` is not all of its head.
    """
    if model.device.type == "meta":
        return
    hidden = check_packs(model.gen.base_model, f"Gen {gen!r}", model.device)
    if model.gen_norm is not None and not ends_in(model.gen.base_model, model.gen_norm, hidden):
        model.gen_norm = None
    ours, expected = model.logits(hidden), model.gen(input_ids=probe(model.device), use_cache=False).logits[0]
    ours, expected = (x - x.mean(dim=-1, keepdim=True) for x in (ours, expected))  # a shift changes no loss
    if not agree(ours, expected, model.gen.dtype):
        name = next(name for name, module in model.gen.named_modules() if module is lm_head(model.gen))
        raise ValueError(
            f"Gen {gen!r} ({type(model.gen).__name__}): its logits are not those of its head {name!r} with a bias, "
            "logit_scale, logits_scaling or final_logit_softcapping, the only ones that NTP knows: choose another "
            "model.gen"
        )
    if model.embseq is None:
        model.embseq_norm = model.gen_norm
        return
    hidden = check_packs(model.embseq, f"Embseq {embseq!r}", model.device)
    if model.embseq_norm is not None and not ends_in(model.embseq, model.embseq_norm, hidden):
        model.embseq_norm = None
