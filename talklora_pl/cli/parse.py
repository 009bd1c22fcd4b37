"""One way to parse for the verbs that are functions of this package."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from keyword import iskeyword
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from talklora_pl.errors import UserError


def parse(verb: str, function: Callable[..., Any], argv: list[str], positional: bool = False) -> dict[str, Any]:
    """Arguments of `function` from a command line.

    Its docstring is the help. An option that is False by default is a flag, and `plugins` may be one name or a list.

    Args:
        positional: what has no default is given without a name.

    Raises:
        UserError: an unknown or missing option, or a value of the wrong type.
    """
    takes = inspect.signature(function).parameters
    flags = {f"--{name}" for name, p in takes.items() if p.default is False}
    # --no-cache is as good as --no_cache, and --for is the option for_: Python has the bare word for itself
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg) for arg in argv]
    argv = [re.sub(r"^--(\w+)", lambda m: m[0] + "_" * iskeyword(m[1]), arg) for arg in argv]
    argv = [f"{arg}=true" if arg in flags else arg for arg in argv]
    # resolved here: jsonargparse would also import what stands under TYPE_CHECKING in the module, and so torch
    function.__annotations__ = get_type_hints(function)
    prog = f"python -m talklora_pl {verb}"
    parser = ArgumentParser(prog=prog, description=(function.__doc__ or "").split("\n")[0], exit_on_error=False)
    parser.add_function_arguments(function, as_positional=positional)
    given = {arg.partition("=")[0] for arg in argv}
    required = [name for name, p in takes.items() if p.default is p.empty and not positional]
    if not {"-h", "--help"} & given and (lacking := [name for name in required if f"--{name}" not in given]):
        raise UserError(f"{verb}: --{lacking[0]} is required. All options: {prog} --help")
    try:
        found = parser.parse_args(argv).as_dict()
    except ArgumentError as e:
        raise UserError(f"{verb}: {' '.join(str(e).split())} All options: {prog} --help") from None
    if isinstance(found.get("plugins"), str):
        found["plugins"] = [found["plugins"]]
    return found
