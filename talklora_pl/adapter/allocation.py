"""From a model and an adapter's options to the number of experts of every target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from talklora_pl.adapter.gated import find_modules
from talklora_pl.adapter.targets import is_linear, layer_stem, output_heads
from talklora_pl.allocation import LayerTargets
from talklora_pl.base.weights import WeightSource

if TYPE_CHECKING:
    from talklora_pl.adapter.config import AdapterConfig


def layer_targets(
    model: nn.Module,
    targets: list[str] | str,
    exclude: list[str] | str = (),  # type: ignore[assignment]
    layers: list[int] | str | None = None,
    site: str = "linear",
) -> list[LayerTargets]:
    """The numbered layers that have targets, in model order. ``model`` may be without weights (meta device).

    Targets outside of the numbered layers are in none of them. Arguments and errors as in
    :func:`~talklora_pl.adapter.gated.find_modules`.
    """
    found = find_modules(model, targets, exclude, layers, site)
    heads = output_heads(model)
    every: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        stem = layer_stem(name)
        if stem and is_linear(module) and id(module) not in heads and not name.startswith("talklora."):
            every.setdefault(stem, []).append(name)
    chosen: dict[str, list[str]] = {}
    for name in found:
        if stem := layer_stem(name):
            chosen.setdefault(stem, []).append(name)
    return [
        LayerTargets(int(stem.rsplit(".", 1)[-1]), tuple(modules), tuple(every.get(stem, ())))
        for stem, modules in chosen.items()
    ]


def bare_layers(model: nn.Module, layers: Sequence[LayerTargets]) -> list[str]:
    """Layers with Linears but without targets, in the same stacks as ``layers``, by name (``model.layers.3``)."""
    served = {layer_stem(module) for layer in layers for module in layer.modules}
    stacks = {stem.rpartition(".")[0] for stem in served if stem}
    stems = dict.fromkeys(layer_stem(name) for name, module in model.named_modules() if is_linear(module))
    return [stem for stem in stems if stem and stem not in served and stem.rpartition(".")[0] in stacks]


def decide(config: AdapterConfig, model: nn.Module, weights: WeightSource) -> dict[str, int]:
    """Experts of every target of ``model``; one outside of the numbered layers keeps ``config.num_experts``.

    ``model`` may be without weights (meta device), if ``weights`` come from elsewhere.

    Raises:
        UserError: targets that match nothing, or a rule that does not fit them.
    """
    where = (config.targets, config.exclude, config.layers, config.experts.site)
    counts = dict.fromkeys(find_modules(model, *where), config.num_experts)
    return counts | config.allocation.allocate(layer_targets(model, *where), config.num_experts, weights)
