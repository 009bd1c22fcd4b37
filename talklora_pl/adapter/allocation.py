"""From a model and an adapter's options to the number of experts of every target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from talklora_pl.allocation import LayerTargets
from talklora_pl.base.weights import WeightSource
from talklora_pl.names import decoder_layer, in_base
from talklora_pl.sites import Site
from talklora_pl.sites.linear import LINEAR
from talklora_pl.sites.targets import is_linear, output_heads

if TYPE_CHECKING:
    from talklora_pl.adapter.config import AdapterConfig


def layer_targets(
    model: nn.Module,
    targets: list[str] | str,
    exclude: list[str] | str = (),  # type: ignore[assignment]
    layers: list[int] | str | None = None,
    site: Site = LINEAR,
) -> list[LayerTargets]:
    """The numbered layers that have targets, in model order. ``model`` may be without weights (meta device).

    Targets outside of the numbered layers are in none of them. Arguments and errors as in
    :meth:`~talklora_pl.sites.Site.find`.
    """
    found = site.find(model, targets, exclude, layers)
    heads = output_heads(model)
    every: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        stem = decoder_layer(name)
        if stem and is_linear(module) and id(module) not in heads and in_base(name):
            every.setdefault(stem, []).append(name)
    chosen: dict[str, list[str]] = {}
    for name in found:
        if stem := decoder_layer(name):
            chosen.setdefault(stem, []).append(name)
    return [
        LayerTargets(int(stem.rsplit(".", 1)[-1]), tuple(modules), tuple(every.get(stem, ())))
        for stem, modules in chosen.items()
    ]


def layers_without_targets(model: nn.Module, layers: Sequence[LayerTargets]) -> list[str]:
    """Layers with Linears but without targets, in the same stacks as ``layers``, by name (``model.layers.3``)."""
    served = {decoder_layer(module) for layer in layers for module in layer.modules}
    stacks = {stem.rpartition(".")[0] for stem in served if stem}
    stems = dict.fromkeys(decoder_layer(name) for name, module in model.named_modules() if is_linear(module))
    return [stem for stem in stems if stem and stem not in served and stem.rpartition(".")[0] in stacks]


def decide(config: AdapterConfig, model: nn.Module, weights: WeightSource) -> dict[str, int]:
    """Experts of every target of ``model``; one outside of the numbered layers keeps ``config.num_experts``.

    ``model`` may be without weights (meta device), if ``weights`` come from elsewhere.

    Raises:
        UserError: targets that match nothing, or a rule that does not fit them.
    """
    site, where = config.experts.site, (config.targets, config.exclude, config.layers)
    counts = dict.fromkeys(site.find(model, *where), config.num_experts)
    return counts | config.allocation.allocate(layer_targets(model, *where, site), config.num_experts, weights)
