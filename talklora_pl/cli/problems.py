"""Every mistake in a command line and its configs, each named, in words that a user can act upon.

jsonargparse stops at the first mistake. So the options are tried in halves, each together with all earlier ones that
are right, until every wrong one is alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from talklora_pl.errors import UserError
from talklora_pl.registry import did_you_mean


class Option(NamedTuple):
    """One option of the command line (`args`, as typed), or one `leaf` of a config file."""

    file: str
    key: str
    args: list[str]
    leaf: Any = None

    def blame(self, message: str) -> tuple[str, str]:
        """What is wrong, this option or what it belongs to, and `message` with that place."""
        place, said = re.fullmatch(r"(?:([\w.]+): )?(.*)", message, re.DOTALL).groups()  # type: ignore[union-attr]
        # a value may be refused where it is linked to
        where = place if place and self.key.startswith(place) else self.key
        return where, f"{self.file}: {where}: {said}" if self.file else f"{where}: {said}"


class Found(NamedTuple):
    """Messages, the keys that they are about, and the command line that is left without those."""

    problems: list[str]
    wrong: list[str]
    right: list[str]


def all_problems(parse: Callable[[list[str]], Any], argv: list[str], required: dict[str, str]) -> Found:
    """What is wrong with each option.

    Args:
        parse: parser of a command line; raises UserError at the first mistake.
        argv: options, with configs as paths.
        required: options without which nothing can be parsed, with any value: they stand in for those that come later.
    """
    stand_in = [f"--{key}={value}" for key, value in required.items()]
    right: list[Option] = []
    found = Found([], [], [])

    def search(options: list[Option]) -> None:
        try:
            parse([*stand_in, *_command_line([*right, *options])])
        except UserError as e:
            if not re.search("(is|are) required", str(e)):  # else another option of the same component may be that
                if len(options) > 1:
                    search(options[: len(options) // 2])
                    search(options[len(options) // 2 :])
                # the options of a class that is wrong itself cannot be judged
                elif not any(options[0].key.startswith(f"{key}.") for key in found.wrong):
                    where, problem = options[0].blame(str(e))
                    found.wrong.append(where)
                    found.problems.append(problem)
                return
        right.extend(options)

    search(list(_options(argv)))
    found.right.extend(_command_line(right))
    try:
        parse(found.right)
    except UserError as e:
        found.wrong.append("")
        found.problems.append(str(e))
    return found


def _options(argv: list[str]) -> Iterator[Option]:
    at = 0
    while at < len(argv):
        count = 1 if "=" in argv[at] or at + 1 == len(argv) or argv[at + 1].startswith("--") else 2
        args = argv[at : at + count]
        name, _, value = args[0].partition("=")
        at += count
        if name in ("-c", "--config"):
            path = args[-1] if count == 2 else value
            if not path:
                raise UserError("--config: which? A file, or the name of a shipped one such as method/talklora.")
            for keys, leaf in _leaves(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}):
                yield Option(path, ".".join(keys), [], leaf)
        else:
            yield Option("", name.removeprefix("--").removesuffix("+"), args)


def _command_line(options: list[Option]) -> list[str]:
    """What is said again, with one config for the neighbours of one file."""
    args: list[str] = []
    for file, group in groupby(options, key=lambda option: option.file):
        if not file:
            args += [arg for option in group for arg in option.args]
            continue
        config: dict[str, Any] = {}
        for option in group:
            *above, last = option.key.split(".")
            reduce(lambda part, key: part.setdefault(key, {}), above, config)[last] = option.leaf
        args += ["--config", yaml.safe_dump(config)]
    return args


def _leaves(config: dict[str, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Lists, and classes with their options, are leaves."""
    for key, value in config.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            yield from _leaves(value, (*keys, str(key)))
        else:
            yield (*keys, str(key)), value


def readable(message: str) -> str:
    """A message of jsonargparse about a value, without its inner workings."""
    found = re.match(r'(?:Parser key "([^"]+)":\s*)?(.*)', message, re.DOTALL)
    assert found is not None
    key, text = found.groups()
    if text.endswith("Got value: None"):
        return f"{key} is required: --{key}, or the same in a config."
    reason = _union(text) if "Union subtypes" in text else _reason(text)
    if (file := re.match(r"Unable to load config '(.*?)'", text)) and str(key).endswith(".base"):
        reason += f" Write {key}: {{path: {file[1]}}}, or --{key}.path {file[1]}."
    return f"{key}: {reason}" if key else reason


PLAIN = {"NoneType": "null", "str": "text", "list": "a list"}


def _reason(text: str) -> str:
    # a text may also be the name of a file with the value
    text = " ".join(re.sub(r"- Expected a path but .* either not accessible or invalid\s+- ", "", text).split())
    if one_of := re.search(r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", text):
        choices, value = [c.strip(" '") for c in one_of[1].split(",")], one_of[2]
        return f"{value!r} is not one of its values.{did_you_mean(value, choices)}"
    if kind := re.fullmatch(r"Expected a <class '(?:\w+\.)*(\w+)'>\. Got value: (.*)", text):
        return f"{kind[2]} is not {PLAIN.get(kind[1], kind[1])}." + (f" Write [{kind[2]}]." * (kind[1] == "list"))
    if file := re.match(r"Unable to load config '(.*?)'", text):
        return f"{file[1]!r} is not a mapping of options, nor a YAML file with one."
    if no_class := re.search(r"expects a function or a callable class: (.*)\. Got value: ", text):
        return f"{no_class[1]}."
    return text


def _union(text: str) -> str:
    reasons, types, values = [], [], set()
    for line in re.findall(r"^\s+- (.*(?:\n\s{8,}[^\s-].*)?)", text, re.MULTILINE):
        if kind := re.match(r"Expected a <class '(?:\w+\.)*(\w+)'>$|Not a valid subclass of (\w+)", line):
            types.append(PLAIN.get(kind[1], kind[1] or kind[2]))
        elif line.startswith("Expected a dot import path"):
            types.append("a mapping of options")
        elif one_of := re.fullmatch(r"Expected a typing\.Literal\[(.*)\]", line):
            values |= {c.strip(" '") for c in one_of[1].split(",")}
        elif not re.match(r"Not of type|Does not validate|Expected a|a class path|a dict with", line):
            reasons.append(_reason(line))
    value = text.rpartition("Given value: ")[2]
    # a base class without options is tried, too
    if reasons := [r for r in reasons if not r.endswith("It has none.")] or reasons:
        return "; ".join(dict.fromkeys(reasons))
    if values:
        return f"{value!r} is not one of its values.{did_you_mean(value, {*values, *types})}"
    hint = f" Write [{value}]." if "a list" in types and value.startswith("{") else ""
    return f"{value} is not {' or '.join(dict.fromkeys(types))}.{hint}"
