"""Extraction: the last hidden state of every sequence of a pack, with final norm and L2 norm in the same pass."""
