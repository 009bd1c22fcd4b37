"""LoRAMoE's localised balance: equal total gate weight per expert, more for tasks of its type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talklora_pl.balance import Balance, BalanceLoss, Scope
from talklora_pl.errors import UserError
from talklora_pl.ranks import sum_over_ranks
from talklora_pl.registry import register
from talklora_pl.routing import RoutingRecord


class LocalisedLoss(BalanceLoss):
    """sum over groups of var(Z) / mean(Z)² over all entries of Z_be = (1 ± delta) sum_t w_te, t in row b."""

    def __init__(self, layers: Mapping[str, int], options: Localised) -> None:
        super().__init__(layers, options)
        self.delta = options.delta

    def rows(self, r: RoutingRecord) -> Tensor:
        """Z_BE of one record."""
        z_BE = r.sum_by_row(r.routing.weights_TE)
        if self.delta == 0:
            return z_BE
        if r.task_types_B is None:
            raise UserError("balance loss 'localised': delta needs the task type of every row; set delta to 0.")
        E = z_BE.shape[1]
        # type 1 is the first half's
        type_E = (torch.arange(E, device=z_BE.device) < E // 2).long()
        same_BE = r.task_types_B.unsqueeze(1) == type_E
        return z_BE * torch.where(same_BE, 1 + self.delta, 1 - self.delta)

    def forward(self, records: Sequence[RoutingRecord]) -> Tensor:
        z = [torch.cat([self.rows(r).reshape(-1) for r in group]) for group in self.grouped(records).values()]
        totals_G, numbers_G = sum_over_ranks(
            torch.stack([z_N.sum() for z_N in z]), torch.stack([z_N.new_full((), len(z_N)) for z_N in z])
        )
        means_G = totals_G / numbers_G
        # the deviations add up to 0, so the mean's own gradient through them does too: it may be held fixed
        deviations = [(z_N - m).square().sum() for z_N, m in zip(z, means_G.detach(), strict=True)]
        (squares_G,) = sum_over_ranks(torch.stack(deviations))
        return (squares_G / (numbers_G - 1) / (means_G**2 + 1e-10)).sum()


@register("localised")
@dataclass
class Localised(Balance):
    """var(Z) / mean(Z)², Z_be = (1 ± delta) sum_t w_te over row b of the batch, summed over groups.

    LoRAMoE (arXiv 2312.09979, equations 6-8), as released. Experts come in two halves, the first for tasks of type 1:
    (1 + delta) where the types of row and expert agree, else (1 - delta). Published with delta 0 and weight 0: off.

    Attributes:
        delta: in [0, 1); not 0 needs ``task_types`` in the batch, 0 or 1 for every row.
    """

    scope: Scope = "router"
    delta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta must be in [0, 1), got {self.delta}")

    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        return LocalisedLoss(layers, self)
