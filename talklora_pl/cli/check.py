"""Every mistake in a command line and its configs, found by the types of the options before anything is built.

:class:`Check` reads the options as they come, one mapping after another, and knows for each class that is chosen by
name (a component, an optimiser, a callback, ...) what it takes. What it cannot judge is left to jsonargparse.
"""

from __future__ import annotations

import collections.abc
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import reduce
from inspect import Parameter
from operator import or_
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from talklora_pl import aliases
from talklora_pl.adapter import AdapterConfig
from talklora_pl.cli.classes import Wrong, children_of, find_class, kind_of
from talklora_pl.cli.values import is_a, is_list, load, merge, undotted
from talklora_pl.registry import Component, did_you_mean
from talklora_pl.typed import alternatives, hints_of, parameters

REFUSALS = (ImportError, ValueError, MisconfigurationException)
"""What classes raise about the values of their options."""


class Problem(NamedTuple):
    """One mistake: the file ("": the command line), the option, what is wrong with it."""

    file: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


@dataclass
class Chosen:
    """A class, what it takes, and what it was given so far: options, and the file and the key to name for each."""

    cls: type
    takes: dict[str, Parameter]
    complete: bool = True  # it takes nothing else
    listed: bool = False  # an item of a list
    default: Any = None  # the instance whose options count where none is given
    options: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, chosen: type, skip: int = 0, **more: Any) -> Chosen:
        _integers_first(chosen)
        return cls(chosen, *parameters(chosen, skip), **more)


class Check:
    """Checks mappings of options.

    Args:
        sections: names of the top level that are classes with options.
        options: its other names, with their types.
        linked: keys that no one can set.
    """

    def __init__(self, sections: Mapping[str, type], options: Mapping[str, Any], linked: tuple[str, ...] = ()) -> None:
        top = {**sections, **options}
        takes = {n: Parameter(n, Parameter.KEYWORD_ONLY, annotation=t, default=None) for n, t in top.items()}
        self.top = Chosen(type(self), takes)
        self.sections = set(sections.values())
        self.linked = linked
        self.problems: list[Problem] = []
        self.chosen: dict[str, list[Chosen]] = {}  # by key; several where a key holds a list
        self.file = ""
        for key, section in sections.items():
            self._record({}, section, key)

    def read(self, options: Mapping[str, Any], file: str = "") -> dict[str, Any]:
        """Check some more options; returns what is right of them, as jsonargparse takes it: with class paths in place
        of registry names and today's names in place of old ones."""
        self.file = file
        return self._options(options, self.top, "")

    def finish(self) -> None:
        """Find what only all options together show: what is missing, and what a class refuses."""
        wrong = {problem.key for problem in self.problems}
        for key, chosen in [(key, one) for key, several in self.chosen.items() for one in several]:
            if any(f"{key}.".startswith(f"{above}.") for above in wrong):
                continue
            lacks = [
                name
                for name, p in chosen.takes.items()
                if p.default is p.empty
                and name not in chosen.options
                and not {f"{key}.{name}"} & (wrong | self.chosen.keys())
            ]
            for name in lacks:
                full = f"{key}.{name}"
                if chosen.listed:
                    self._report(key, f"{chosen.cls.__name__} needs its option {name!r}.", "")
                else:
                    self._report("", f"{full} is required: --{full}, or the same in a config.", "")
            if is_dataclass(chosen.cls) and not lacks and not any(w.startswith(f"{key}.") for w in wrong):
                self._build(chosen, key)  # it checks its values

    def refused(self) -> list[Problem]:
        """Find out which class refuses the values of its options, after building all of them has failed."""
        for key, chosen in [(key, one) for key, several in self.chosen.items() for one in several]:
            if chosen.cls not in self.sections and not is_dataclass(chosen.cls):
                self._build(chosen, key)
        return self.problems

    def _build(self, chosen: Chosen, key: str) -> None:
        if any(self._classes(p.annotation)[0] and name in chosen.options for name, p in chosen.takes.items()):
            return
        try:
            if chosen.default is None:
                chosen.cls(**chosen.options)
            else:
                replace(chosen.default, **chosen.options)
        except TypeError:  # arguments that come later, such as an optimiser's parameters
            pass
        except Exception as e:
            # a logger's package is not installed, or its service refuses with an error of its own
            if not isinstance(e, REFUSALS) and not issubclass(chosen.cls, Logger):
                raise
            named = [place for option, place in chosen.places.items() if re.search(rf"\b{option}\b", str(e))]
            file, place = (named or [(file, key) for file, _ in chosen.places.values()] or [("", key)])[0]
            self._report(place, str(e), file)

    def _report(self, key: str, text: str, file: str | None = None) -> None:
        self.problems.append(Problem(self.file if file is None else file, key, text))

    # --- mappings of options

    def _options(self, given: Any, chosen: Chosen, key: str, item: bool = False) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise Wrong(f"{given} is not a mapping of options.")
        out: dict[str, Any] = {}
        for name, value in map(undotted, given.items()):
            bare = name.removesuffix("+")
            full = f"{key}.{bare}".removeprefix(".")
            where = key if item else full
            if bare in chosen.takes and full not in self.linked:
                try:
                    right = self._value(value, chosen.takes[bare].annotation, full, add=name.endswith("+"))
                except Wrong as e:
                    if str(e):
                        self._report(where, f"{bare}: {e}" if item else str(e))
                    continue
                chosen.options[bare], chosen.places[bare] = right, (self.file, where)
                merge(out, {name: right})
            elif not chosen.complete:
                try:
                    _refuse_classes(value)
                except Wrong as e:
                    self._report(where, f"{bare}: {e}" if item else str(e))
                    continue
                out[name] = value
            elif chosen is self.top or (self._is_record(chosen.cls) and not chosen.listed):
                known = list(self._keys(self.top, ""))
                words = [option for option in known if bare in option.rpartition(".")[2]]  # an abbreviation
                close = list(dict.fromkeys([*get_close_matches(full, words or known, n=3, cutoff=0.6), *words]))[:3]
                hint = f" Did you mean {' or '.join(close)}?" if close else ""
                self._report(full, f"There is no option {full!r}.{hint} All options: --help.")
            else:
                hint = did_you_mean(bare, chosen.takes) if chosen.takes else " It has none."
                self._report(where, f"The chosen component has no option {bare!r}.{hint}")
        return out

    def _record(self, given: Mapping[str, Any], cls: type, key: str, listed: bool = False) -> dict[str, Any]:
        """Options of a class that nobody has to choose."""
        if listed or not self.chosen.get(key):
            chosen = Chosen.of(cls, listed=listed)
            self.chosen.setdefault(key, []).append(chosen)
            for name, p in chosen.takes.items() if not listed else ():
                if self._is_record(p.annotation):
                    self._record({}, p.annotation, f"{key}.{name}")
                elif isinstance(default := _default(cls, name, p), Component):
                    self.chosen[f"{key}.{name}"] = [Chosen.of(type(default), default=default)]
        if cls is AdapterConfig:
            given = aliases.renamed(given, say=True)
        return self._options(given, self.chosen[key][-1], key, listed)

    def _choice(
        self, given: Mapping[str, Any], classes: tuple[type, ...], skip: int, key: str, listed: bool
    ) -> dict[str, Any]:
        """A class with options (`class_path`, `init_args`), or options of the one that was chosen before."""
        given = dict(map(undotted, given.items()))
        out = dict(given)
        if "class_path" in given:
            before = self.chosen.get(key, [])
            self.chosen[key] = before if listed else []
            out["class_path"], cls = find_class(given["class_path"], classes)
            for name in given.keys() - {"class_path", "init_args", "dict_kwargs"}:
                self._report(key, f"{name!r} stands beside class_path. Options of the class go under init_args.")
                del out[name]
            chosen = Chosen.of(cls, skip, listed=listed)
            if before and not listed:  # what the new class takes, too, stays
                kept = before[-1].options.keys() & chosen.takes.keys()
                chosen.options = {name: before[-1].options[name] for name in kept}
                chosen.places = {name: before[-1].places[name] for name in kept}
                if before[-1].cls is cls:
                    chosen.default = before[-1].default
            self.chosen[key].append(chosen)
        elif key in self.chosen:
            if not self.chosen[key]:
                raise Wrong()  # that class is wrong itself
            chosen = self.chosen[key][-1]
            if "init_args" not in given:
                return self._options(given, chosen, key, listed)
        else:
            return out  # of the family's base
        for part in ("init_args", "dict_kwargs"):  # jsonargparse takes an option out of either
            if part in given:
                out[part] = self._options(given[part] or {}, chosen, key, listed)
        return out

    # --- one value

    def _value(self, value: Any, hint: Any, key: str, add: bool = False, listed: bool = False) -> Any:
        kinds, (classes, skip) = alternatives(hint), self._classes(hint)
        records = [kind for kind in kinds if self._is_record(kind)]
        items = next((get_args(kind)[0] for kind in kinds if is_list(kind)), None)
        plain = [kind for kind in kinds if self._is_plain(kind)]
        if isinstance(value, str) and classes and "." in value:
            value = aliases.class_path(value, say=True)
        if isinstance(value, str):
            loaded, structured = load(value), len(plain) < len(kinds)
            if not any(is_a(value, kind) for kind in plain) or (structured and isinstance(loaded, (dict, list))):
                value = loaded
        if any(is_a(value, kind) for kind in plain):
            _refuse_classes(value, plain)
            if not listed:
                self.chosen.pop(key, None)
            return value
        if add or (items is not None and isinstance(value, list)):
            if items is None:
                raise Wrong("this is no list, so nothing can be added to it.")
            if not add:
                self.chosen[key] = []
            right = [self._value(v, items, key, listed=True) for v in (value if isinstance(value, list) else [value])]
            return right if isinstance(value, list) else right[0]
        if isinstance(value, Mapping):
            if (named := _record_by_name(kinds, self._is_record)) and all(
                isinstance(v, Mapping) for v in value.values()
            ):
                return {name: self._record(v, named, f"{key}.{name}", listed=True) for name, v in value.items()}
            if items is not None and not self.file and "class_path" not in value and self.chosen.get(key):
                return self._options(value, self.chosen[key][-1], key)  # of the last item
            if records:
                return self._record(value, records[0], key, listed)
            if classes:
                return self._choice(value, classes, skip, key, listed)
        if isinstance(value, str):
            if classes and (kind_of(classes) or value in children_of(classes) or "." in value):
                return self._choice({"class_path": value}, classes, skip, key, listed)["class_path"]
            if records and Path(value).is_file():
                return value  # its options are in there
        raise Wrong(self._not_a(value, kinds, key))

    def _not_a(self, value: Any, kinds: list[Any], key: str) -> str:
        """That a value is of none of some types."""
        value = "null" if value is None else value
        words = list(dict.fromkeys(word for kind in kinds if (word := self._word(kind))))
        if choices := [str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]:
            return f"{str(value)!r} is not one of its values.{did_you_mean(str(value), {*choices, *words})}"
        if isinstance(value, str) and words == ["a mapping of options"]:
            hint = f" Write {key}: {{path: {value}}}, or --{key}.path {value}." if key.endswith(".base") else ""
            return f"{value!r} is not a mapping of options, nor a YAML file with one.{hint}"
        hint = f" Write [{value}]." if "a list" in words and (words == ["a list"] or isinstance(value, dict)) else ""
        hint = "" if "a mapping of int to int" in words else hint
        return f"{value} is not {' or '.join(words)}.{hint}"

    # --- types

    def _is_record(self, kind: Any) -> bool:
        return kind in self.sections or (
            isinstance(kind, type) and is_dataclass(kind) and not issubclass(kind, Component)
        )

    def _is_plain(self, kind: Any) -> bool:
        """Neither chosen by name nor with options of its own."""
        if is_list(kind):
            return all(self._is_plain(item) for item in alternatives(get_args(kind)[0]))
        if _record_by_name([kind], self._is_record):
            return False
        return not self._is_record(kind) and not self._classes(kind)[0]

    def _classes(self, hint: Any) -> tuple[tuple[type, ...], int]:
        """Classes of which a child is chosen by name, and how many arguments it gets later (a Callable's)."""
        found: list[type] = []
        skip = 0
        for kind in alternatives(hint):
            if get_origin(kind) is collections.abc.Callable:
                taken, made = get_args(kind) or (..., Any)
                skip = len(taken) if isinstance(taken, list) else 0
                found += [c for c in alternatives(made) if _is_class(c)]
            elif _is_class(kind) and not self._is_record(kind):
                found.append(kind)
        return tuple(found), skip

    def _word(self, kind: Any) -> str:
        """What a value of this type is called in a message."""
        if get_origin(kind) is dict and get_args(kind) == (int, int):
            return "a mapping of int to int"
        if self._is_record(kind) or get_origin(kind) is dict or kind is dict:
            return "a mapping of options"
        if classes := self._classes(kind)[0]:
            return f"the name of a {kind_of(classes)}" if kind_of(classes) else ""
        if get_origin(kind) is tuple and ... not in get_args(kind):
            return f"a list of {len(get_args(kind))}"
        if is_list(kind) or kind in (list, tuple) or get_origin(kind) is tuple:
            return "a list"
        return {NoneType: "null", str: "text", int: "int", float: "float", bool: "bool"}.get(kind, "")

    def _keys(self, chosen: Chosen, key: str) -> Iterator[str]:
        """All options that need no choice."""
        for name, p in chosen.takes.items():
            full = f"{key}.{name}".removeprefix(".")
            records = [kind for kind in alternatives(p.annotation) if self._is_record(kind)]
            if full in self.linked:
                continue
            if full not in self.sections:
                yield full
            for record in records:
                yield from self._keys(Chosen.of(record), full)


def _default(cls: type, name: str, parameter: Parameter) -> Any:
    factory = (
        next((f.default_factory for f in fields(cls) if f.name == name), MISSING) if is_dataclass(cls) else MISSING
    )
    return parameter.default if factory is MISSING else factory()  # type: ignore[operator]


def _integers_first(cls: type) -> None:
    """Put int before float where a class takes both: jsonargparse tries types in their order, and to Lightning 1 and
    1.0 are different things.

    typing keeps one object for Union[int, float] and Union[float, int], so what a class says depends on what was
    imported before it.
    """
    for init in (vars(base).get("__init__") for base in cls.__mro__):
        for name, hint in hints_of(init).items():
            kinds = alternatives(hint)
            if int in kinds and float in kinds[: kinds.index(int)]:
                init.__annotations__[name] = reduce(or_, sorted(kinds, key=lambda kind: kind is float))


def _refuse_classes(value: Any, kinds: Sequence[Any] = (Any,)) -> None:
    """Raise Wrong where a value names a class and nothing says of what kind it has to be: jsonargparse would call
    whatever `class_path` names."""
    if isinstance(value, str) and any(kind not in (str, int, float, bool, NoneType) for kind in kinds):
        value = load(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, Mapping) and "class_path" in value:
        raise Wrong(f"class_path: {value['class_path']}: this option does not say of which kind a class has to be.")
    for each in inner:
        _refuse_classes(each)


def _is_class(kind: Any) -> bool:
    """Not a type that is written as a plain value, as those of the standard library are."""
    return isinstance(kind, type) and get_origin(kind) is None and kind.__module__ not in sys.stdlib_module_names


def _record_by_name(kinds: list[Any], is_record: Callable[[Any], bool]) -> Any:
    """The class with options of which a mapping by name is taken; None if there is none."""
    found = (get_args(kind)[1] for kind in kinds if get_origin(kind) is dict)
    return next((kind for kind in found if is_record(kind)), None)
