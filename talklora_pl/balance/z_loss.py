"""Keeps router logits small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talklora_pl.balance import Balance, BalanceLoss
from talklora_pl.ranks import sum_over_ranks
from talklora_pl.registry import register
from talklora_pl.routing import RoutingRecord


class ZLossModule(BalanceLoss):
    """sum over groups of mean_t logsumexp_e(logits)²."""

    def forward(self, records: Sequence[RoutingRecord]) -> Tensor:
        statistics = []
        for group in self.grouped(records).values():
            z = [r.routing.logits_TE.logsumexp(-1).square() for r in group]
            statistics += [
                torch.stack([(r.mask_T * z_T).sum() for r, z_T in zip(group, z, strict=True)]).sum(),
                torch.stack([r.mask_T.sum() for r in group]).sum(),
            ]
        sums = iter(sum_over_ranks(*statistics))
        return torch.stack([z / tokens.clamp(min=1) for z, tokens in zip(sums, sums, strict=True)]).sum()


@register("z_loss")
@dataclass
class ZLoss(Balance):
    """mean_t (log sum_e exp logit_te)², summed over groups (ST-MoE, arXiv 2202.08906, equation 5)."""

    weight: float = 0.001

    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        return ZLossModule(layers, self)
