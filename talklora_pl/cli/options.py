"""A command line, option by option: shipped configs by name, and what is right of it as jsonargparse takes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from talklora_pl import strict
from talklora_pl.adapter.config import FAMILIES, START, AdapterConfig
from talklora_pl.cli.check import Check, Problem
from talklora_pl.cli.values import load, merge, undotted
from talklora_pl.errors import UserError
from talklora_pl.paths import expand
from talklora_pl.registry import did_you_mean
from talklora_pl.shipped import shipped_configs
from talklora_pl.warm_start import SavedAdapter


def find_config(name: str) -> str:
    """Path of a config: a file, or the name of a shipped one such as ``method/talklora``.

    Raises:
        UserError: neither.
    """
    folder = shipped_configs()
    for path in (Path(expand(name)), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    known = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]
    raise UserError(
        f"--config: there is no file {name!r} and no shipped config of that name.{did_you_mean(name, known)}"
    )


class Option(NamedTuple):
    """One option (`key`, and its value as typed, None if there is none), or all of a config, with its `file` if it is
    from one."""

    key: str = ""
    value: str | None = None
    file: str = ""
    config: Mapping[str, Any] | None = None

    @property
    def asks(self) -> bool:
        """Whether it wants to be shown something instead of a run."""
        return self.key in ("help", "print_config") or self.key.endswith(".help")


def split(argv: list[str]) -> list[Option]:
    """The options of a command line, with configs read.

    Raises:
        UserError: a word that belongs to no option, or a config that cannot be read.
    """
    rest, out = list(argv), list[Option]()
    while rest:
        name, equals, value = (typed := rest.pop(0)).partition("=")
        if not typed.startswith("-"):
            hint = f"options begin with two dashes: --{name}" if "." in name else "this belongs to no option"
            raise UserError(f"{name}: {hint}.")
        key = {"-c": "config", "-h": "help"}.get(name, name.removeprefix("--"))
        takes = not equals and key not in ("help", "print_config") and rest and not rest[0].startswith("--")
        option = Option(key, value if equals else rest.pop(0) if takes else None)
        if key == "config":
            if not option.value:
                raise UserError("--config: which? A file, or the name of a shipped one such as method/talklora.")
            file = find_config(option.value)
            option = Option(file=file, config=_config(file))
        out.append(option)
    return out


def _config(file: str) -> Mapping[str, Any]:
    data = read_yaml(Path(file).read_bytes(), file)
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{file}: a config is a mapping of options, this is a {type(data).__name__}.")
    return data or {}


def read_yaml(text: str | bytes, where: str) -> Any:
    """What YAML text says; `where` it stands is for messages."""
    try:
        data = strict.read_yaml(text)
        loaded = load(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise UserError(f"{where} is not readable as YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as e:  # a number of 5,000 digits is a ValueError
        raise UserError(f"{where} is not readable as YAML: {' '.join(str(e).split())}") from None
    try:
        json.dumps(data, default=str, skipkeys=True)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not readable as YAML: something in it contains itself.") from None
    return data if isinstance(loaded, str) else loaded  # `a:` is a text to jsonargparse


def plugins(options: list[Option]) -> list[str]:
    """Plugins named by configs and options, to be imported before anything is checked."""
    found: list[Any] = []
    for option in options:
        if option.config is not None:
            found.append(option.config.get("plugins") or [])
        elif option.key.removesuffix("+") == "plugins":
            found.append(read_yaml(option.value or "", "--plugins"))
    names = [name for entry in found for name in (entry if isinstance(entry, list) else [entry])]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"plugins: a list of modules or .py files, and {wrong[0]!r} is neither.")
    return names


def merged(options: list[Option]) -> dict[str, Any]:
    """All options as one mapping; of several values of an option the last."""
    out: dict[str, Any] = {}
    for option in options:
        merge(out, _nested({option.key: load(option.value or "")} if option.config is None else option.config))
    return out


def _nested(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    out: dict[str, Any] = {}
    for name, inner in map(undotted, value.items()):
        merge(out, {name: _nested(inner)})
    return out


def start_options(options: list[Option]) -> list[Option]:
    """The options of the adapter that ``model.adapter_path`` names, for what is not given, as a config before others.

    Raises:
        UserError: there is no such adapter.
    """
    model = merged(options).get("model")
    if not isinstance(model, dict) or not isinstance(path := model.get("adapter_path"), str):
        return []
    given = model.get("adapter")
    found = adapter_options(SavedAdapter.read(path).config())
    if isinstance(given, dict) and given.keys() & {"rank", "expert_rank"}:  # they exclude each other
        del found["rank"], found["expert_rank"]
    return [Option(file=path, config={"model": {"adapter": found}})]


def adapter_options(adapter: AdapterConfig) -> dict[str, Any]:
    """All options of an adapter as a config has them."""
    found = adapter.to_dict()
    for key, value in found.items():
        if key in FAMILIES:
            found[key] = _component(value)
    found["balance"] = [_component(value) for value in found["balance"]]
    # what it begins from is no part of the adapter, and so not of its dict
    return found | {key: value for key in sorted(START) if (value := getattr(adapter, key))}


def _component(value: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": value["name"], "init_args": {k: v for k, v in value.items() if k != "name"}}


def right(options: list[Option], check: Check) -> list[str]:
    """The command line for jsonargparse, without what `check` finds wrong (its ``problems``)."""
    kept: list[tuple[Option, dict[str, Any]]] = []
    for option in options:
        key = option.key.removesuffix(".help")
        if option.config is not None:
            kept.append((option, check.read(option.config, option.file)))
        elif option.value is not None and option.key != "print_config":
            kept.append((option, check.read({key: option.value})))
        else:
            kept.append((option, {}))
            if not option.asks:
                check.problems.append(Problem("", key, f"there is no value: --{key} VALUE."))
    if not any(option.asks for option in options):
        check.finish()
    wrong = {problem.key for problem in check.problems if problem.key}
    return [arg for option, config in kept for arg in _arguments(option, _without(config, wrong))]


def _without(config: Mapping[str, Any], wrong: set[str], above: str = "") -> dict[str, Any]:
    out = {}
    for name, value in config.items():
        # init_args have the keys of their class
        key = above.removesuffix(".") if name == "init_args" else above + str(name).removesuffix("+")
        if name == "init_args" or key not in wrong:
            out[name] = _without(value, wrong, f"{key}.") if isinstance(value, dict) else value
    return out


def _arguments(option: Option, config: Mapping[str, Any]) -> Iterator[str]:
    if option.config is not None:
        yield f"--config={_dump(config)}"
        return
    names, value = list[str](), config
    for _ in option.key.removesuffix(".help").split(".") if config else ():
        if not value:  # wrong
            return
        ((name, value),) = value.items()
        names.append(name)
    if option.asks:
        given = value if config else option.value
        yield f"--{option.key}" + (f"={given}" if given is not None else "")
    elif config:
        unchanged = value == load(option.value or "")
        yield f"--{'.'.join(names)}={option.value if unchanged else value if isinstance(value, str) else _dump(value)}"


class _Quoted(yaml.SafeDumper):
    """Texts in quotation marks: 1e3 would be a number to jsonargparse."""


def _quote(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"')


_Quoted.add_representer(str, _quote)
_Quoted.add_multi_representer(str, _quote)  # RowsInPython


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Quoted, default_flow_style=True, sort_keys=False, width=math.inf).strip()
