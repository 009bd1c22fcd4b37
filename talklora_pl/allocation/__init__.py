"""Allocation rules: how many experts does each layer get?

A rule looks at the target layers of a model, and at the frozen weights if it wants, and answers with one number per
target module. One new file in this folder with one registered class is one new rule.

Published rules are *shapes* over the depth (MoLA) or follow the spectra of the pretrained weights (AlphaLoRA).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from talklora_pl.base.weights import WeightSource
from talklora_pl.registry import Component, import_siblings


@dataclass(frozen=True)
class LayerTargets:
    """What a rule may know of one decoder layer.

    Attributes:
        index: number of the decoder layer, from 0.
        modules: full names of the modules that get experts, in model order.
        all_modules: full names of every Linear of the layer: the published layer metric is a mean over all of them.
    """

    index: int
    modules: tuple[str, ...]
    all_modules: tuple[str, ...]


class Allocation(Component):
    """Family base. A child is a dataclass whose fields are the user's options."""

    family = "allocation rule"

    @abstractmethod
    def allocate(
        self, layers: Sequence[LayerTargets], num_experts: int, weights: WeightSource | None = None
    ) -> dict[str, int]:
        """Decide the experts of every target module.

        Args:
            layers: the decoder layers that have targets, in depth order.
            num_experts: the configured number, the average where the rule has no budget of its own.
            weights: the frozen weights, one matrix at a time; rules that need none ignore it.

        Returns:
            ``{module name: number of experts}``, each at least 1, for exactly the modules of ``layers``.

        Raises:
            UserError: the options do not fit the layers, or the weights cannot be used.
        """


def per_layer(layers: Sequence[LayerTargets], counts: Sequence[int]) -> dict[str, int]:
    """Give each module of layer i the i-th count."""
    return {module: count for layer, count in zip(layers, counts, strict=True) for module in layer.modules}


import_siblings(__name__)
