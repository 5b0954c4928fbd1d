"""Checkpoints for sentence-transformers and transformers, with their model cards."""

from cosup_fast.export.card import RunFacts
from cosup_fast.export.hub import push
from cosup_fast.export.sentence_transformers import EXPORT, export

__all__ = ["EXPORT", "RunFacts", "export", "push"]
