"""Values as YAML and a command line have them: read, put together, compared to plain types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import get_loader

from talklora_pl.typed import alternatives, fits

_load: Callable[[str], Any] = get_loader("yaml")


def load(text: str) -> Any:
    """What YAML says, as jsonargparse reads it (1e-3 is a number), or the text itself."""
    try:
        value = _load(text)
        repr(value)  # can messages say what it is?
        return value
    except (yaml.YAMLError, ValueError, RecursionError):  # a number of 5,000 digits, a list in a list in a list ...
        return text


def undotted(item: tuple[Any, Any]) -> tuple[str, Any]:
    """``a.b: c`` is ``a: {b: c}``."""
    name, _, rest = str(item[0]).partition(".")
    return name, {rest: item[1]} if rest else item[1]


def merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def is_list(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(list, origin) and len(get_args(kind)) == 1


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain type. Types that jsonargparse converts in its own way take every text."""
    if kind in (str, int, float, bool, NoneType) or get_origin(kind) is Literal:
        return fits(value, kind)
    if is_list(kind):
        item = get_args(kind)[0]
        return isinstance(value, list) and all(
            is_any_of(v, item) or (isinstance(v, str) and is_any_of(load(v), item)) for v in value
        )
    if get_origin(kind) is tuple and ... not in get_args(kind):
        items = get_args(kind)
        fitting = isinstance(value, (list, tuple)) and len(value) == len(items)
        return fitting and all(is_any_of(v, item) for v, item in zip(value, items))
    if get_origin(kind) is dict and get_args(kind) == (int, int):
        return fits(value, kind)  # a config.yaml has its keys as text
    if get_origin(kind) in (dict, tuple) or kind in (dict, list):
        return isinstance(value, (dict, list, tuple)) and isinstance(value, dict) == (dict in (kind, get_origin(kind)))
    if isinstance(kind, type) and kind not in (object, Any):  # Any is a class since Python 3.11
        return isinstance(value, (str, kind))
    return True


def is_any_of(value: Any, hint: Any) -> bool:
    return any(is_a(value, kind) for kind in alternatives(hint))
