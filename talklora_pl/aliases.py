"""Names of earlier versions that files of users still hold. All of them go in version 0.3.

Adapter folders, checkpoints and ``config.yaml`` files are read through :func:`renamed` and :func:`class_path`; nothing
writes an old name.
"""

from __future__ import annotations

from typing import Any

KEYS = {"also_train": "modules_to_save"}
"""Options of the adapter: old name -> name."""

CLASS_PATHS = {
    "talklora_pl.schedules.": "talklora_pl.optim.",
    "talklora_pl.allocation.rules.Uniform": "talklora_pl.allocation.rules.UniformAllocation",
    "talklora_pl.communication.silent.": "talklora_pl.communication.identity.",
}
"""Class paths that a YAML file can hold: an old path, or an old module with a dot -> the new one."""


def renamed(adapter: dict[str, Any]) -> dict[str, Any]:
    """An adapter's options with today's names."""
    return {KEYS.get(key, key): value for key, value in adapter.items()}


def class_path(path: str) -> str:
    """Where a class is today."""
    if path in CLASS_PATHS:
        return CLASS_PATHS[path]
    module = path.rpartition(".")[0] + "."
    return path.replace(module, CLASS_PATHS.get(module, module), 1)
