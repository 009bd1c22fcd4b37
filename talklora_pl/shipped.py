"""The configs that come with the package, and the methods among them. Free of torch until a method is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talklora_pl.errors import UserError

if TYPE_CHECKING:
    from talklora_pl.adapter.config import AdapterConfig


def shipped_configs() -> Path:
    """The folder of the configs that come with the package."""
    spec = importlib.util.find_spec("talklora_pl.configs")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        return Path(folder)
    raise UserError("The configs folder of talklora_pl is missing from this installation.")


def methods() -> list[str]:
    """Names of the methods that come with the package: what :func:`method` and ``--config method/NAME`` take."""
    return sorted(file.stem for file in (shipped_configs() / "method").glob("*.yaml"))


def method(name: str = "talklora", **changes: Any) -> AdapterConfig:
    """The options of a method, from the file that ``--config method/NAME`` reads.

    Args:
        name: one of :func:`methods`.
        changes: options of :class:`~talklora_pl.adapter.config.AdapterConfig` in place of the file's. A part is its
            registry name, a component, or a dict: with ``name`` another component, without it other options of the
            file's.

    Raises:
        UserError: no such method, option or component, or a combination that makes no sense.
    """
    import yaml

    from talklora_pl.adapter.config import FAMILIES, START, AdapterConfig
    from talklora_pl.registry import Component, did_you_mean, to_dict

    if name not in methods():
        raise UserError(f"There is no method {name!r}.{did_you_mean(name, methods())}")
    file = shipped_configs() / "method" / f"{name}.yaml"
    options: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["adapter"]

    def part(value: Any, before: dict[str, Any]) -> Any:
        """A component in the form of an adapter file."""
        if isinstance(value, Component):
            return to_dict(value)
        if not isinstance(value, Mapping):
            return {"name": value}
        if "class_path" in value:
            return {"name": value["class_path"], **(value.get("init_args") or {})}
        return dict(value) if "name" in value else {**before, **value}

    found: dict[str, Any] = {}
    for given in (options, changes):
        if given.keys() & {"rank", "expert_rank"}:  # they exclude each other
            found.pop("rank", None), found.pop("expert_rank", None)
        for key, value in given.items():
            if key in FAMILIES:
                value = part(value, found.get(key, {}))
            elif key == "balance" and isinstance(value, list):
                value = [part(item, {}) for item in value]
            found[key] = value
    start = {key: found.pop(key) for key in START & found.keys()}  # no file has them, so from_dict does not know them
    return replace(AdapterConfig.from_dict(found), **start)
