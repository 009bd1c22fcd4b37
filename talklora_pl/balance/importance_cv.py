"""Balance of the experts' total weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from talklora_pl.balance import Balance, BalanceLoss
from talklora_pl.registry import register
from talklora_pl.routing import RoutingRecord


class ImportanceLoss(BalanceLoss):
    """sum over groups of var_e(I) / mean_e(I)², I_e = sum_t w_te."""

    def statistics(self, record: RoutingRecord) -> tuple[Tensor, ...]:
        return (record.routing.weights_TE,)

    def value(self, tokens: Tensor, *sums: Tensor) -> Tensor:
        (i_E,) = sums
        return i_E.var(correction=0) / (i_E.mean() ** 2 + 1e-10)


@register("importance_cv")
@dataclass
class ImportanceCV(Balance):
    """CV(I)², I_e = sum_t w_te, summed over groups: 0 when all experts have the same total weight.

    Shazeer et al., arXiv 1701.06538, equations 6 and 7.
    """

    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        return ImportanceLoss(layers, self)
