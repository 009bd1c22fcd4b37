"""Load balance as in Switch Transformer and Mixtral: choices times probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from talklora_pl.balance import Balance, BalanceLoss
from talklora_pl.registry import register
from talklora_pl.routing import RoutingRecord


class SwitchLoss(BalanceLoss):
    """sum over groups of E sum_e f_e P_e; the gradient flows through P only."""

    def __init__(self, layers: Mapping[str, int], options: Switch) -> None:
        super().__init__(layers, options)
        self.count = options.count

    def statistics(self, record: RoutingRecord) -> tuple[Tensor, ...]:
        probs_TE = record.routing.probs_TE
        # summed over the choices: K may differ among the layers of a group
        one_E = torch.arange(probs_TE.shape[1], device=probs_TE.device)  # one_hot reads the range of the numbers back
        chosen_TE = (record.chosen().unsqueeze(-1) == one_E).sum(1).float()
        return chosen_TE, probs_TE

    def value(self, tokens: Tensor, *sums: Tensor) -> Tensor:
        chosen_E, p_E = sums
        n = tokens.clamp(min=1)
        f_E = chosen_E / (n if self.count == "per_choice" else chosen_E.sum().clamp(min=1))
        return len(p_E) * (f_E.to(p_E.dtype) * p_E / n).sum()


@register("switch")
@dataclass
class Switch(Balance):
    """E sum_e f_e P_e, f the share of choices and P the mean probability of expert e, summed over groups.

    Switch Transformer (arXiv 2101.03961, equation 4). MoLA: ``scope: layer``, ``count: share``, 1 per layer when
    balanced; Mixtral and MixLoRA: ``scope: model``, ``count: per_choice``, K when balanced.

    Attributes:
        count: ``share``: f sums to 1 over experts; ``per_choice``: it is a fraction of tokens for each of the K
            choices, so it sums to K.
        compat: ``published``: a layer with one expert counts too, 1 without a gradient, as in MoLA's released code.
    """

    count: Literal["share", "per_choice"] = "share"
    compat: Literal["none", "published"] = "none"

    def counts(self, num_experts: int) -> bool:
        return super().counts(num_experts) or self.compat == "published"

    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        return SwitchLoss(layers, self)
