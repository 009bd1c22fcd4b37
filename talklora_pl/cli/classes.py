"""Classes that are chosen by name (a component, an optimiser, a callback, ...): which one a name means."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import talklora_pl.optim  # noqa: F401 (its schedules are known by their bare names)
from talklora_pl import aliases, registry
from talklora_pl.errors import UserError
from talklora_pl.registry import Component, did_you_mean

KINDS: dict[type, str] = {
    Optimizer: "optimizer",
    LRScheduler: "learning-rate schedule",
    Callback: "callback",
    Logger: "logger",
}
"""Families of classes that are chosen by name; those of the package register themselves."""


class Wrong(Exception):
    """What is wrong with a value; nothing if that follows from what was said before."""


def find_class(name: Any, families: tuple[type, ...]) -> tuple[str, type]:
    """The class of that name or path, and how jsonargparse knows it. It is a child of one of `families`.

    Raises:
        Wrong: there is none; the nearest names are named.
    """
    kind = kind_of(families) or families[0].__name__
    if not isinstance(name, str):
        raise Wrong(f"class_path: {name} is not the name of a {kind}.")
    if "." in name:
        path = aliases.class_path(name, say=True)
        module, _, last = path.rpartition(".")
        try:
            cls = getattr(import_module(module), last)
        except (ImportError, AttributeError, ValueError):
            package = module.partition(".")[0]
            if package.isidentifier() and find_spec(package) is None:
                raise Wrong(f"There is no class {name!r}: the package {package!r} is not installed here.") from None
            raise Wrong(f"There is no class {name!r}.{did_you_mean(last, children_of(families))}") from None
        if not (isinstance(cls, type) and issubclass(cls, families)):
            raise Wrong(f"{name} is not a {kind}.")
        return path, cls
    children = children_of(families)
    if len(same := children.get(name, [])) > 1:
        # of two libraries that use one name, that which extends the other, or to which the family belongs
        own = {family.__module__.partition(".")[0] for family in families}
        of_family = [c for c in same if c.__module__.partition(".")[0] in own]
        cls = next((c for c in same if all(issubclass(c, other) for other in same)), None)
        cls = cls or (of_family[0] if len(of_family) == 1 else None)
        paths = [f"{c.__module__}.{c.__qualname__}" for c in same]
        if cls is None:  # torch's AdamW, though something has imported bitsandbytes, which has another
            ours = [c for c in same if c.__module__.split(".")[0] in ("torch", "lightning")]
            cls = ours[0] if len(ours) == 1 else None
        if cls is None:
            raise Wrong(f"{name!r} is the name of several: {', '.join(sorted(paths))}. Write one of these.")
        return paths[same.index(cls)], cls
    for family in families:
        if issubclass(family, Component):
            try:
                cls = children[name][0] if name in children else registry.get(family, name)
            except UserError as e:
                raise Wrong(str(e)) from None
            return f"{cls.__module__}.{cls.__qualname__}", cls
    if name not in children:
        raise Wrong(f"There is no {kind} {name!r}.{did_you_mean(name, children)}")
    return name, children[name][0]


def kind_of(families: tuple[type, ...]) -> str:
    """What such classes are called, if they are known."""
    return next(
        (
            f.family if issubclass(f, Component) else KINDS[f]
            for f in families
            if f in KINDS or issubclass(f, Component)
        ),
        "",
    )


def children_of(families: tuple[type, ...]) -> dict[str, list[type]]:
    """Known children by their bare names."""
    found: dict[str, list[type]] = {}
    for family in families:
        children = [family]
        while children:
            cls = children.pop()
            children += cls.__subclasses__()
            hidden = cls.__name__.startswith("_") or "<locals>" in cls.__qualname__ or inspect.isabstract(cls)
            if not hidden and cls not in found.get(cls.__name__, []):
                found.setdefault(cls.__name__, []).append(cls)
    return found
