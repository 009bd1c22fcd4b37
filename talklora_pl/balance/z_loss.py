"""Keeps router logits small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from talklora_pl.balance import Balance, BalanceLoss
from talklora_pl.registry import register
from talklora_pl.routing import RoutingRecord


class ZLossModule(BalanceLoss):
    """sum over groups of mean_t logsumexp_e(logits)²."""

    def statistics(self, record: RoutingRecord) -> tuple[Tensor, ...]:
        return (record.routing.logits_TE.logsumexp(-1).square(),)

    def value(self, tokens: Tensor, *sums: Tensor) -> Tensor:
        return sums[0] / tokens.clamp(min=1)


@register("z_loss")
@dataclass
class ZLoss(Balance):
    """mean_t (log sum_e exp logit_te)², summed over groups (ST-MoE, arXiv 2202.08906, equation 5)."""

    weight: float = 0.001

    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        return ZLossModule(layers, self)
