"""AlphaLoRA: layers whose weights have a lighter-tailed spectrum get more experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from talklora_pl.allocation import Allocation, LayerTargets, per_layer
from talklora_pl.allocation.cache import exponents
from talklora_pl.allocation.spectra import mean
from talklora_pl.base.weights import WeightSource
from talklora_pl.errors import UserError
from talklora_pl.registry import register


def apportion(
    alphas: Sequence[float], budget: int, beta: float = 2.5, compat: Literal["official"] | None = None
) -> list[int]:
    """Share out ``budget`` experts in proportion to s_l = alpha_l ** beta, at least one each.

    Default: largest remainder. With pool = all and b = budget: shares q_l = b s_l / Σ_pool s; whoever has q_l < 1 gets
    1 and leaves the pool with it, until nobody does; then ⌊q_l⌋ each, and the rest one by one to the largest fractions,
    the lower index first on a tie.

    ``official``: the released rule. n_l = round(budget s_l / Σ s), then until the sum is right +1 at argmin(s_l - n_l)
    or -1 at argmax(s_l - n_l): it compares unnormalised scores with the wrong sign, and may leave a layer without
    experts.

    Raises:
        UserError: budget smaller than the number of layers; an exponent that is not a positive number; a layer left
            without experts by the official rule.
    """
    if budget < len(alphas):
        raise UserError(
            f"A budget of {budget} experts is too small for {len(alphas)} layers or modules: each needs at least 1."
        )
    for i, alpha in enumerate(alphas):
        if not (math.isfinite(alpha) and alpha > 0):
            raise UserError(
                f"Exponent {i} is {alpha}: there is no power-law tail to go by. Try another estimator (median)."
            )
    try:
        scores = [alpha**beta for alpha in alphas]
    except OverflowError:
        scores = [math.inf]
    if not (0 < math.fsum(scores) < math.inf and min(scores) > 0):
        raise UserError(f"beta = {beta} takes the exponents beyond the range of numbers; published is 2.5.")
    if compat == "official":
        counts = _official(scores, budget)
        if 0 in counts:
            raise UserError(
                f"The published rule leaves layer {counts.index(0)} without experts here. Leave 'compat' out for the "
                "largest-remainder rule, or raise the budget."
            )
        return counts
    return _largest_remainder(scores, budget)


def _largest_remainder(scores: Sequence[float], budget: int) -> list[int]:
    pool, counts = list(range(len(scores))), [1] * len(scores)
    while True:
        total = math.fsum(scores[i] for i in pool)
        share = {i: budget * scores[i] / total for i in pool}
        small = [i for i in pool if share[i] < 1]
        if not small:
            break
        budget -= len(small)
        pool = [i for i in pool if share[i] >= 1]
    for i in pool:
        counts[i] = math.floor(share[i])
    rest = budget - sum(counts[i] for i in pool)
    for i in sorted(pool, key=lambda i: (counts[i] - share[i], i))[:rest]:
        counts[i] += 1
    return counts


def _official(scores: Sequence[float], budget: int) -> list[int]:
    total = sum(scores)
    counts = [round(budget * score / total) for score in scores]
    while (difference := budget - sum(counts)) != 0:
        gaps = [score - count for score, count in zip(scores, counts)]
        if difference > 0:
            counts[gaps.index(min(gaps))] += 1
        else:
            counts[gaps.index(max(gaps))] -= 1
    return counts


@register("alpha")
@dataclass
class Alpha(Allocation):
    """Experts in proportion to alpha ** beta, alpha the power-law exponent of the frozen weights (AlphaLoRA).

    Attributes:
        budget: experts summed over layers (published: 160 for 32 layers); by default num_experts x layers. Each target
            module of a layer gets the layer's number.
        beta: how strongly the exponent counts; 0 is uniform.
        estimator: where the tail starts: ``peak`` as published (noisy), ``median`` (stable), ``hill`` (textbook).
        granularity: one number per ``layer`` from the mean over all its Linears (published), or one per target
            ``module`` from its own exponent, with the same total.
        compat: ``official`` for the released rounding repair, wrong signs included.
    """

    budget: int | None = None
    beta: float = 2.5
    estimator: Literal["peak", "median", "hill"] = "peak"
    granularity: Literal["layer", "module"] = "layer"
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1:
            raise UserError(f"allocation alpha: budget = {self.budget} must be at least 1.")
        if not math.isfinite(self.beta):
            raise UserError(f"allocation alpha: beta = {self.beta} must be a finite number.")
        for option, value, choices in (
            ("estimator", self.estimator, ("peak", "median", "hill")),
            ("granularity", self.granularity, ("layer", "module")),
            ("compat", self.compat, (None, "official")),
        ):
            if value not in choices:
                raise UserError(f"allocation alpha: {option} = {value!r} is none of {', '.join(map(str, choices))}.")
        if self.compat and self.granularity == "module":
            raise UserError(
                "allocation alpha: the published rule (compat) is per layer; leave out granularity or compat."
            )

    def allocate(
        self, layers: Sequence[LayerTargets], num_experts: int, weights: WeightSource | None = None
    ) -> dict[str, int]:
        if not layers or not all(layer.modules for layer in layers):
            raise UserError(
                "allocation alpha: a layer without target modules cannot be given experts; check the targets."
            )
        if weights is None:
            raise UserError("allocation alpha: the rule needs the frozen weights, and none were given.")
        budget = num_experts * len(layers) if self.budget is None else self.budget
        if budget < len(layers):
            raise UserError(
                f"allocation alpha: a budget of {budget} experts is too small for {len(layers)} layers, each needs 1."
            )
        if self.granularity == "layer":
            return per_layer(layers, apportion(self.layer_alphas(layers, weights), budget, self.beta, self.compat))
        modules = [module for layer in layers for module in layer.modules]
        # the same total as per layer: budget x modules per layer
        total = round(budget * len(modules) / len(layers))
        found = exponents(weights, modules)
        alphas = [getattr(found[module], self.estimator) for module in modules]
        return dict(zip(modules, apportion(alphas, total, self.beta)))

    def layer_alphas(self, layers: Sequence[LayerTargets], weights: WeightSource) -> list[float]:
        """Metric of each layer: the plain mean over every Linear of it."""
        found = exponents(weights, [module for layer in layers for module in layer.all_modules])
        return [mean(getattr(found[module], self.estimator) for module in layer.all_modules) for layer in layers]
