"""Gen and Embseq: two `transformers` causal LMs over packs without pad tokens."""

from cosup_fast.model.model import CoSupervisionModel

__all__ = ["CoSupervisionModel"]
