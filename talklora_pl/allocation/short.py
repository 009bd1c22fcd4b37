"""Rules in the short form of the command line."""

from __future__ import annotations

from typing import Any

import yaml

from talklora_pl import registry
from talklora_pl.allocation import Allocation
from talklora_pl.allocation.alpha import Alpha
from talklora_pl.allocation.rules import PUBLISHED, File, Groups, Published
from talklora_pl.errors import UserError


def parse_rule(text: str, alpha: Alpha) -> Allocation:
    """A rule from its short form on the command line: ``mola-2468``, ``alpha:estimator=median``, ``mine.yaml``.

    Args:
        alpha: gives what ``alpha`` does not say itself.
    """
    if text.endswith((".yaml", ".yml", ".json")):
        return File(text)
    name, *options = text.split(":")
    if name in PUBLISHED:
        return Published(name)
    shape = name.removeprefix("mola-")
    if shape != name:
        if not shape.isdigit():
            raise UserError(f"--rules: {text!r} should read like mola-2468, one digit for each group of layers.")
        return Groups([int(digit) for digit in shape])
    given: dict[str, Any] = {"name": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--rules: {option!r} in {text!r} should read option=value.")
        given[key] = yaml.safe_load(value)
    if name == Alpha.name:
        given = registry.to_dict(alpha) | given
    rule: Allocation = registry.from_dict(Allocation, given)
    return rule
