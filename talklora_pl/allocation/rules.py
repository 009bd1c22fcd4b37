"""Allocation rules that need no weights: the same everywhere, MoLA's shapes, a list, a file, a published list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from talklora_pl.allocation import Allocation, LayerTargets, per_layer
from talklora_pl.base.weights import WeightSource
from talklora_pl.errors import UserError
from talklora_pl.paths import expand
from talklora_pl.registry import did_you_mean, register
from talklora_pl.strict import read_yaml

PUBLISHED: dict[str, tuple[int, ...]] = {
    # AlphaLoRA's released run script, T = 160 over 32 layers, beta = 2.5
    "alphalora-mistral-7b": (
        *(1, 3, 5, 4, 4, 5, 4, 4, 3, 3, 2, 2, 2, 2, 3, 4),
        *(9, 4, 8, 7, 8, 7, 8, 7, 9, 8, 6, 10, 6, 7, 3, 2),
    ),
}


def _counts(counts: Sequence[Any], where: str) -> list[int]:
    for i, count in enumerate(counts):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{where}: entry {i} is {count!r}; a number of experts is a whole number of at least 1.")
    return list(counts)


def _spread(experts: Any, layers: Sequence[LayerTargets], where: str) -> dict[str, int]:
    """One count per layer, or a table ``{module: count}``, to the modules of ``layers``."""
    if isinstance(experts, dict):
        modules = [module for layer in layers for module in layer.modules]
        if missing := [module for module in modules if module not in experts]:
            raise UserError(f"{where}: {len(missing)} target modules have no entry, the first is {missing[0]!r}.")
        if extra := [module for module in experts if module not in set(modules)]:
            raise UserError(
                f"{where}: {extra[0]!r} is not a target module.{did_you_mean(str(extra[0]), modules[:500])[:600]}"
            )
        return dict(zip(modules, _counts([experts[module] for module in modules], where)))
    if not isinstance(experts, list | tuple):
        raise UserError(f"{where}: expected a list (one number per layer) or a table module: number, got {experts!r}.")
    if len(experts) != len(layers):
        raise UserError(f"{where} has {len(experts)} entries, but {len(layers)} decoder layers have targets.")
    return per_layer(layers, _counts(experts, where))


@register("uniform")
@dataclass
class UniformAllocation(Allocation):
    """The configured number of experts in every layer."""

    def allocate(
        self, layers: Sequence[LayerTargets], num_experts: int, weights: WeightSource | None = None
    ) -> dict[str, int]:
        return per_layer(layers, [num_experts] * len(layers))


@register("groups")
@dataclass
class Groups(Allocation):
    """Equal groups of neighbouring layers, one number each: MoLA's 2468 (▽), 8642 (△), 5555 (□), 8228 (⋈).

    Layer l of L is in group ⌊l G / L⌋ of G, so that any depth works; for L a multiple of G the groups are equal.
    """

    shape: list[int] = field(default_factory=lambda: [2, 4, 6, 8])
    """Experts per layer in each group, from the input to the output."""

    def __post_init__(self) -> None:
        if not self.shape:
            raise UserError("allocation groups: 'shape' needs at least one number.")
        self.shape = _counts(self.shape, "allocation groups: shape")

    def allocate(
        self, layers: Sequence[LayerTargets], num_experts: int, weights: WeightSource | None = None
    ) -> dict[str, int]:
        if len(layers) < len(self.shape):
            raise UserError(f"allocation groups: {len(self.shape)} groups for {len(layers)} layers with targets.")
        return per_layer(layers, [self.shape[i * len(self.shape) // len(layers)] for i in range(len(layers))])


@register("list")
@dataclass
class Listed(Allocation):
    """Numbers of your own: one per decoder layer, or a table ``{module: number}``."""

    experts: list[int] | dict[str, int] = field(default_factory=list)

    def allocate(
        self, layers: Sequence[LayerTargets], num_experts: int, weights: WeightSource | None = None
    ) -> dict[str, int]:
        return _spread(self.experts, layers, "allocation list: experts")


@register("published")
@dataclass
class Published(Allocation):
    """A list that the authors of a method released."""

    of: str = "alphalora-mistral-7b"
    """Which one."""

    def __post_init__(self) -> None:
        if self.of not in PUBLISHED:
            raise UserError(f"allocation published: unknown list {self.of!r}.{did_you_mean(self.of, PUBLISHED)}")

    def allocate(
        self, layers: Sequence[LayerTargets], num_experts: int, weights: WeightSource | None = None
    ) -> dict[str, int]:
        return _spread(PUBLISHED[self.of], layers, f"allocation published: {self.of}")


@register("file")
@dataclass
class File(Allocation):
    """A YAML or JSON file: what ``talklora_pl allocate`` wrote, or just a list or a table of numbers."""

    path: str = ""

    def allocate(
        self, layers: Sequence[LayerTargets], num_experts: int, weights: WeightSource | None = None
    ) -> dict[str, int]:
        path = Path(expand(self.path))
        if not self.path or not path.is_file():
            raise UserError(f"allocation file: there is no file {self.path!r}. Write one with the allocate command.")
        try:
            content = read_yaml(path.read_text())
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            raise UserError(f"{path}: not valid YAML or JSON: {' '.join(str(e).split())}") from None
        for key in ("model", "adapter", "allocation", "init_args", "experts"):
            if isinstance(content, dict) and key in content:
                content = content[key]
        return _spread(content, layers, f"{path}")
