"""JSON and YAML in which no key stands twice: of two values both readers would take the last in silence."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import yaml


def read_json(text: str, **options: Any) -> Any:
    """What JSON text says. Raises ValueError (JSONDecodeError where it is broken), RecursionError."""
    return json.loads(text, object_pairs_hook=_unique, **options) if options else _DECODER.decode(text)


def read_yaml(text: str | bytes) -> Any:
    """What YAML text says. Raises YAMLError, ValueError, RecursionError."""
    return yaml.load(text, Loader=_UniqueKeys)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return table


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # making one costs as much as reading a short row


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice in one mapping", key.start_mark
                    )
                keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep)
