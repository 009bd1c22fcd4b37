"""Does a value from a JSON or YAML file have the type that a class declares? Nothing is converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from inspect import Parameter, formatannotation, signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is a ``hint``: plain classes, ``Literal``, unions, lists, tuples and dicts of them."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, a) for a in alternatives(hint))
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is list:
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(fits(v, a) for v in value for a in args if a is not ...)
    if origin is dict:
        return isinstance(value, dict) and all(_key_fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, str, bool, NoneType):
        return type(value) is hint
    return isinstance(value, origin or hint)


def _key_fits(key: Any, hint: Any) -> bool:
    """JSON writes every key as text."""
    return fits(key, hint) or (hint is int and isinstance(key, str) and key.isdecimal())


def alternatives(hint: Any) -> list[Any]:
    """The members of a union, those of unions in it included, or the type itself."""
    if get_origin(hint) in (Union, UnionType):
        return [kind for arg in get_args(hint) for kind in alternatives(arg)]
    return [hint]


@cache
def parameters(cls: type, skip: int = 0) -> tuple[dict[str, Parameter], bool]:
    """What a class takes by name, with its types, and whether this is all.

    Args:
        skip: its first so many arguments are left out.
    """
    found: dict[str, Parameter] = {}
    for base in cls.__mro__:
        if base is object:
            break
        if "__init__" not in vars(base):
            continue
        init = base.__dict__["__init__"]
        hints = hints_of(init)
        own = list(signature(init).parameters.values())[1 + skip :]
        named = (p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        for p in named:  # what comes from a base may be filled in by the class
            default = p.default if base is cls or p.default is not p.empty else None
            found.setdefault(p.name, p.replace(annotation=hints.get(p.name, Any), default=default))
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            return found, True
    return found, not any("__init__" in vars(base) for base in cls.__mro__ if base is not object)


def problems(cls: type, values: Mapping[str, Any]) -> list[str]:
    """One phrase for every value that is not of its field's type; fields whose type cannot be read are not checked."""
    hints = hints_of(cls)
    declared = {f.name for f in fields(cls)}
    return [
        f"{key} must be {formatannotation(hints[key])}, got {_short(value)}"
        for key, value in values.items()
        if key in declared and key in hints and not fits(value, hints[key])
    ]


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except (NameError, TypeError):
        return {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
