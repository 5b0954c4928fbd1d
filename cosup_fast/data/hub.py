"""Data sets of the Hugging Face hub, read through `datasets`."""

from __future__ import annotations

from typing import Any

from cosup_fast.data.records import DataError


def hub_rows(spec: str) -> tuple[str, Any]:
    """`hf:owner/name:split` in full, and that `datasets.Dataset`: memory-mapped, with rows that may hold None."""
    import datasets

    name, _, split = spec.removeprefix("hf:").partition(":")
    split = split or "train"
    try:
        return f"hf:{name}:{split}", datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub, the network and the files each raise kinds of their own
        raise DataError(f"{spec}: expected a data set that `datasets` can load, found: {error}") from error


def without_none(value: Any) -> Any:
    """A row without the None that Arrow puts where a row lacks a field that another has."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value
