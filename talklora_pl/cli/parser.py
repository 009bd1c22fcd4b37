"""Lightning's parser with registry names in place of class paths, and the nearest names where one is unknown."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

import jsonargparse._typehints as typehints
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import talklora_pl.optim  # noqa: F401 (known by their bare names)
from talklora_pl import registry
from talklora_pl.cli.problems import readable
from talklora_pl.errors import UserError

KINDS = {Optimizer: "optimizer", LRScheduler: "learning-rate schedule", Callback: "callback", Logger: "logger"}
"""Families of classes that are chosen by name; those of the package register themselves."""

_resolve = typehints.resolve_class_path_by_name


def _resolve_name(family: Any, name: str) -> str:
    """Class path of a registered name or of a class of Lightning or PyTorch; the one hook that jsonargparse lacks."""
    if isinstance(family, type) and issubclass(family, registry.Component) and "." not in name:
        if any(name == c.__name__ for c in family._members.values()):
            return _resolve(family, name)
        cls = registry.get(family, name)
        return f"{cls.__module__}.{cls.__qualname__}"
    path = _resolve(family, name)
    kinds = [KINDS[f] for f in get_args(family) or [family] if f in KINDS]
    if kinds and "." not in path:
        known = {p.rpartition(".")[2] for p in typehints.get_all_subclass_paths(family)}
        raise UserError(f"There is no {kinds[0]} {name!r}.{registry.did_you_mean(name, known)}")
    return path


typehints.resolve_class_path_by_name = _resolve_name  # type: ignore[assignment]


class Parser(LightningArgumentParser):
    """One message per mistake, with the nearest options where one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        message = readable(message)
        known = [o.removeprefix("--") for a in self._all_options() for o in a.option_strings if o.startswith("--")]
        if bare := re.search(r"unrecognized arguments: ([^- =]+)", message):
            hint = f"options begin with two dashes: --{bare[1]}" if bare[1] in known else "this belongs to no option"
            message = f"{bare[1]}: {hint}."
        elif unknown := re.search(r"unrecognized arguments: --([^ =]+)|does not accept option '([\w.]+)'", message):
            option = unknown[1] or unknown[2]
            close = difflib.get_close_matches(option, known, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            message = f"There is no option {option!r}.{hint} All options: --help."
        elif refused := re.search(r"Option '(\w+)' is not accepted", message):  # this is the parser of one class
            known = [option for option in known if "help" not in option]
            hint = registry.did_you_mean(refused[1], known) if known else " It has none."
            message = f"The chosen component has no option {refused[1]!r}.{hint}"
        raise UserError(message)

    def _all_options(self) -> list[Any]:
        subparsers = (p for a in self._actions for p in (getattr(a, "choices", None) or {}).values())  # type: ignore[union-attr]
        return [*self._actions, *(a for p in subparsers if isinstance(p, Parser) for a in p._actions)]
