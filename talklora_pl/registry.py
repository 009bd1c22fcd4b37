"""Names for parts: ``gnn`` in a YAML file, on the command line or in an adapter file means one class.

A *component* is a dataclass of options with a ``build`` method. It derives from the abstract base of its family
(:class:`~talklora_pl.experts.Experts`, :class:`~talklora_pl.communication.Communication`, ...) and registers itself::

    @register("mean")
    @dataclass
    class Mean(Communication):
        gain: float = 1.0

        def build(self, layer): ...

Files store names and options only (:func:`to_dict`), so that loading one never imports what the file says.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from abc import ABC
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from talklora_pl import typed
from talklora_pl.errors import UserError
from talklora_pl.paths import expand

C = TypeVar("C", bound="type[Component]")


class Component(ABC):
    """Base of all families. A family sets ``family`` (its word in messages) and declares an abstract ``build``."""

    family: ClassVar[str] = ""
    name: ClassVar[str] = ""
    _members: ClassVar[dict[str, type[Component]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Component in cls.__bases__:
            cls._members = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a dataclass child of a family known under ``name``."""

    def add(cls: C) -> C:
        if not (isinstance(cls, type) and issubclass(cls, Component) and cls.family):
            raise TypeError(f"@register({name!r}) needs a subclass of a component family, got {cls!r}")
        if not is_dataclass(cls):
            raise TypeError(f"@register({name!r}): put @dataclass below it, so that {cls.__name__} has typed options")
        known = cls._members.get(name)
        # the same file imported twice (for example as a plugin and as a module) replaces itself
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise UserError(f"{cls.family} {name!r} is registered twice: {known.__module__} and {cls.__module__}")
        cls.name = name
        cls._members[name] = cls
        _resolve_types(cls)
        return cls

    return add


def _resolve_types(cls: type[Component]) -> None:
    """Put types where a dataclass has their names: jsonargparse looks names of a base up in the file of its child only,
    and accepts every value where it does not find one."""
    try:
        types = get_type_hints(cls)
    except NameError:  # a name that exists for type checkers only
        return
    for f in fields(cls):  # type: ignore[arg-type]
        f.type = cls.__init__.__annotations__[f.name] = types[f.name]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean ...? Choices: ...`` for an error message."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{hint} Choices: {', '.join(choices)}."


def names(family: type[Component]) -> list[str]:
    """Registered names of a family."""
    return sorted(family._members)


def get(family: type[Component], name: str) -> type[Component]:
    """The class registered as ``name``.

    Raises:
        UserError: unknown name, with the nearest names and all choices.
    """
    if name not in family._members:
        raise UserError(
            f"Unknown {family.family} {name!r}.{did_you_mean(name, family._members)} "
            "A component of your own must be listed under 'plugins:' (--plugins FILE, in Python plugins=[FILE]) so "
            "that its registration runs."
        )
    return family._members[name]


def to_dict(component: Component) -> dict[str, Any]:
    """``{"name": ..., option: value, ...}``, plain data for JSON."""
    return {"name": component.name, **asdict(component)}  # type: ignore[call-overload]


def from_dict(family: type[Component], data: str | dict[str, Any]) -> Any:
    """Inverse of :func:`to_dict`; a bare name means its defaults. Nothing is imported.

    Raises:
        UserError: unknown name or option.
    """
    data = {"name": data} if isinstance(data, str) else dict(data) if isinstance(data, dict) else {}
    if not isinstance(data.get("name"), str):
        raise UserError(f"A {family.family} needs a 'name' (text), got {data!r}.")
    cls = get(family, data.pop("name"))
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise UserError(f"{family.family} {cls.name!r} has no option {key!r}.{did_you_mean(key, known)}")
    if wrong := typed.problems(cls, data):
        raise UserError(f"{family.family} {cls.name!r}: {'; '.join(wrong)}.")
    try:
        return cls(**data)
    except (TypeError, ValueError) as e:
        raise UserError(f"{family.family} {cls.name!r}: {e}") from None


def options(cls: type[Component]) -> list[tuple[str, str, Any]]:
    """``(name, type, default)`` of every option of a component class."""
    out = []
    for f in fields(cls):  # type: ignore[arg-type]
        default = (
            f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None
        )
        out.append((f.name, f.type if isinstance(f.type, str) else inspect.formatannotation(f.type), default))
    return out


def import_siblings(package: str) -> None:
    """Import every module of a component folder, so that one new file there is a new component."""
    for info in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{info.name}")


def import_plugins(plugins: Iterable[str]) -> None:
    """Import a user's components: module names (``my.module``) or paths of ``.py`` files.

    Only the user's own configuration or code calls this; data and adapter files never do.

    Raises:
        UserError: the module cannot be found or fails while it is imported.
    """
    for plugin in plugins:
        path = Path(expand(plugin))
        try:
            if plugin.endswith(".py"):
                if not path.is_file():
                    raise UserError(f"plugins: there is no file {plugin!r}.")
                loaded = sys.modules.get(path.stem)
                if loaded is not None and not _is_of(loaded, path):
                    where = getattr(loaded, "__file__", None) or "built into Python"
                    raise UserError(
                        f"plugins: {plugin!r} would be the module {path.stem!r}, and another of that name is loaded "
                        f"({where}). Give the file another name."
                    )
                if loaded is None:
                    spec = importlib.util.spec_from_file_location(path.stem, path)
                    assert spec is not None and spec.loader is not None
                    module = importlib.util.module_from_spec(spec)
                    sys.modules[path.stem] = module
                    try:
                        spec.loader.exec_module(module)
                    except BaseException:
                        del sys.modules[path.stem]
                        raise
            else:
                if "" not in sys.path and str(Path.cwd()) not in sys.path:
                    sys.path.insert(0, str(Path.cwd()))
                importlib.import_module(plugin)
        except UserError:
            raise
        except SystemExit as e:
            raise UserError(f"plugins: importing {plugin!r} ended the program (sys.exit, status {e.code}).") from e
        except Exception as e:
            raise UserError(f"plugins: importing {plugin!r} failed: {type(e).__name__}: {e}") from e


def _is_of(module: Any, path: Path) -> bool:
    """Whether a loaded module was made from this file."""
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).exists() and path.samefile(file)
