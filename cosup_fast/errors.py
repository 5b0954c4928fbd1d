"""`CosupError`, the base of every error class that this package defines; docs/errors.md lists them."""

from __future__ import annotations


class CosupError(Exception):
    """Raised on purpose, with a message that names what is wrong and the remedy.

    Each subclass also derives from the built-in class that fits (`ValueError` for most), so that code which knows
    nothing of this package can catch it. An argument of a wrong type or value is a plain `TypeError` or `ValueError`.
    """
