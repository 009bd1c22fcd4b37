"""GraphLoRA's Poisson distinction: a token's experts have clearly different ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from talklora_pl.balance import Balance, BalanceLoss
from talklora_pl.registry import register
from talklora_pl.routing import RoutingRecord

Form = Literal["abs", "kl"]


def divergence(log_q_E: Tensor, f_TE: Tensor, form: Form) -> Tensor:
    """sum_e q |log(q / f)| as released, or sum_e q log(q / f), the Kullback-Leibler divergence of the paper."""
    ratio = log_q_E - f_TE.log()
    return (log_q_E.exp() * (ratio.abs() if form == "abs" else ratio)).sum(-1)


class PoissonLoss(BalanceLoss):
    """mean over groups and tokens of sum_i q_i |log(q_i / s_i)|, s the sorted probabilities.

    q_i ∝ λ^i / i!, i = 1..E, with one trained λ per group (``rate``, (G,)), held in [1, 2], where q does not increase.
    """

    def __init__(self, layers: Mapping[str, int], options: Poisson) -> None:
        super().__init__(layers, options)
        self.form = options.form
        self.rate = nn.Parameter(torch.full((len(self.experts),), 1.5))

    def statistics(self, record: RoutingRecord) -> tuple[Tensor, ...]:
        rate = self.rate.clamp(1, 2)[list(self.experts).index(self.group[record.layer])]
        s_TE = record.routing.probs_TE.sort(dim=-1, descending=True).values
        i_E = torch.arange(1, s_TE.shape[1] + 1, device=s_TE.device, dtype=s_TE.dtype)
        log_q_E = (i_E * rate.to(s_TE.dtype).log() - torch.lgamma(i_E + 1)).log_softmax(-1)
        return (divergence(log_q_E, s_TE + 1e-16, self.form),)

    def value(self, tokens: Tensor, *sums: Tensor) -> Tensor:
        return sums[0] / tokens.clamp(min=1)

    def total(self, values_G: Tensor) -> Tensor:
        return values_G.mean()


@register("poisson")
@dataclass
class Poisson(Balance):
    """mean_t sum_i q_i |log(q_i / s_ti)|, q_i ∝ λ^i / i! for i = 1..E, s_t the falling probabilities of token t.

    GraphLoRA/GMoE (arXiv 2412.16216, equations 6 and 7), in the absolute form of the released code; the mean over
    groups. λ starts at 1.5 and is trained; outside of [1, 2] its gradient is zero.

    Attributes:
        form: ``abs`` as released, ``kl`` as in the paper.
    """

    weight: float = 0.005
    form: Form = "abs"

    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        return PoissonLoss(layers, self)
