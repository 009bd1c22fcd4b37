"""Balance of the experts' total weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talklora_pl.balance import Balance, BalanceLoss
from talklora_pl.ranks import sum_over_ranks
from talklora_pl.registry import register
from talklora_pl.routing import RoutingRecord


class ImportanceLoss(BalanceLoss):
    """sum over groups of var_e(I) / mean_e(I)², I_e = sum_t w_te."""

    def forward(self, records: Sequence[RoutingRecord]) -> Tensor:
        importance = [
            torch.stack([r.mask_T.to(r.routing.weights_TE.dtype) @ r.routing.weights_TE for r in group]).sum(0)
            for group in self.grouped(records).values()
        ]
        squares = [i_E.var(correction=0) / (i_E.mean() ** 2 + 1e-10) for i_E in sum_over_ranks(*importance)]
        return torch.stack(squares).sum()


@register("importance_cv")
@dataclass
class ImportanceCV(Balance):
    """CV(I)², I_e = sum_t w_te, summed over groups: 0 when all experts speak equally loud in sum.

    Shazeer et al., arXiv 1701.06538, equations 6 and 7.
    """

    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        return ImportanceLoss(layers, self)
