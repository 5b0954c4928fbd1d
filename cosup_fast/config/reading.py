"""Reading YAML from people: keys given twice, files nested too deep and those that unfold without end are errors."""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 100_000
"""As many values as a configuration may unfold to; aliases can make billions of a few lines."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which every key of a mapping is there once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                mark = seen[key.value].start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice, first in line {mark.line + 1}", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = key
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is not YAML, has a key twice, is nested too deep, or unfolds to more than `MOST_VALUES`.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _unfolded(node, {}) > MOST_VALUES:
                raise yaml.YAMLError(f"its aliases unfold to more than {MOST_VALUES:,} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep, or contains itself") from None
    except (ValueError, OverflowError) as error:  # a date that does not exist, a number too long to read
        raise yaml.YAMLError(str(error)) from None


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases followed; a node is counted once."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # one that contains itself
        children = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
            if isinstance(node, yaml.SequenceNode)
            else []
        )
        known[id(node)] = 1 + sum(_unfolded(child, known) for child in children)
    return known[id(node)]
