"""The decoder layers of a model as allocation rules see them."""

from __future__ import annotations

from torch import nn

from talklora_pl.adapter.targets import find_targets, is_linear, output_heads
from talklora_pl.allocation import Allocation, LayerTargets
from talklora_pl.allocation.weights import WeightSource


def _stem(name: str) -> str | None:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``: up to the first number."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), None)


def layer_targets(
    model: nn.Module,
    targets: list[str] | str,
    exclude: list[str] | str = (),  # type: ignore[assignment]
    layers: list[int] | str | None = None,
) -> list[LayerTargets]:
    """The numbered layers that have targets, in model order. ``model`` may be without weights (meta device).

    Targets outside of the numbered layers are in none of them. Arguments and errors as in
    :func:`~talklora_pl.adapter.targets.find_targets`.
    """
    found = find_targets(model, targets, exclude, layers)
    heads = output_heads(model)
    every: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        stem = _stem(name)
        if stem and is_linear(module) and id(module) not in heads and not name.startswith("talklora."):
            every.setdefault(stem, []).append(name)
    chosen: dict[str, list[str]] = {}
    for name in found:
        if stem := _stem(name):
            chosen.setdefault(stem, []).append(name)
    return [
        LayerTargets(int(stem.rsplit(".", 1)[-1]), tuple(modules), tuple(every.get(stem, ())))
        for stem, modules in chosen.items()
    ]


def decide(
    rule: Allocation,
    model: nn.Module,
    targets: list[str] | str,
    exclude: list[str] | str = (),  # type: ignore[assignment]
    layers: list[int] | str | None = None,
    num_experts: int = 4,
    weights: WeightSource | None = None,
) -> dict[str, int]:
    """Experts of every target module of ``model``; a target outside of the numbered layers keeps ``num_experts``."""
    counts = {name: num_experts for name in find_targets(model, targets, exclude, layers)}
    counts.update(rule.allocate(layer_targets(model, targets, exclude, layers), num_experts, weights))
    return counts
