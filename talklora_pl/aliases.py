"""Names of earlier versions that files of users still hold. All of them go in version 0.3.

Adapter folders, checkpoints and ``config.yaml`` files are read through :func:`renamed` and :func:`class_path`; nothing
writes an old name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

KEYS = {"also_train": "modules_to_save"}
"""Options of the adapter: old name -> name."""

CLASS_PATHS = {
    "talklora_pl.schedules.": "talklora_pl.optim.",
    "talklora_pl.allocation.rules.Uniform": "talklora_pl.allocation.rules.UniformAllocation",
    "talklora_pl.communication.silent.": "talklora_pl.communication.identity.",
}
"""Class paths that a YAML file can hold: an old path, or an old module with a dot -> the new one."""


def renamed(adapter: Mapping[str, Any], say: bool = False) -> dict[str, Any]:
    """An adapter's options with today's names; `say` that there was an old one."""

    def new(key: str) -> str:
        bare = key.removesuffix("+")  # as in `modules_to_save+: lm_head`
        return _said(bare, KEYS[bare], say) + key[len(bare) :] if bare in KEYS else key

    return {new(key): value for key, value in adapter.items()}


def class_path(path: str, say: bool = False) -> str:
    """Where a class is today; `say` that it was elsewhere."""
    module = path.rpartition(".")[0] + "."
    new = CLASS_PATHS.get(path) or path.replace(module, CLASS_PATHS.get(module, module), 1)
    return new if new == path else _said(path, new, say)


def _said(old: str, new: str, say: bool) -> str:
    if say:  # Python says a warning once
        warnings.warn(f"{old} is now {new}; the old name goes in version 0.3.", stacklevel=2)
    return new
