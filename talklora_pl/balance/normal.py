"""GraphLoRA's Normal balance: over all training, loads follow the flat middle of a normal curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from talklora_pl.balance import Balance, BalanceLoss
from talklora_pl.balance.poisson import Form, divergence
from talklora_pl.ranks import sum_over_ranks
from talklora_pl.registry import register
from talklora_pl.routing import RoutingRecord


class NormalLoss(BalanceLoss):
    """mean over groups of sum_i q_i |log(q_i / f_i)|, f the sorted shares of all counts so far.

    q_i ∝ N(i; E/2, σ²), i = 0..E-1, sorted, with one trained σ per group (``sigma``, (G,)), at least 0.1. ``counts``
    holds those of all groups, one after the other; the gradient reaches the newest micro-step's part only.
    """

    counts: Tensor

    def __init__(self, layers: Mapping[str, int], options: Normal) -> None:
        super().__init__(layers, options)
        self.options = options
        self.sigma = nn.Parameter(torch.tensor([E / 2 for E in self.experts.values()]))
        self.register_buffer("counts", torch.zeros(sum(self.experts.values())))

    def forward(self, records: Sequence[RoutingRecord]) -> Tensor:
        groups = self.grouped(records)
        added = dict(zip(groups, sum_over_ranks(*map(self.count, groups.values())), strict=True))
        decay = self.options.decay if self.options.memory == "ema" else 1.0
        before = dict(zip(self.experts, self.counts.split(list(self.experts.values())), strict=True))
        after = {name: decay * c_E + added[name] if name in added else c_E for name, c_E in before.items()}
        if self.training:
            self.counts.copy_(torch.cat(list(after.values())).detach())
        sigmas = dict(zip(self.experts, self.sigma.clamp(min=0.1), strict=True))
        curves = {name: self.curve(sigmas[name].to(after[name].dtype), self.experts[name]) for name in groups}
        norm_of_all = torch.cat(list(curves.values())).logsumexp(0)
        out = []
        for name, log_q_E in curves.items():
            norm = norm_of_all if self.options.compat == "published" else log_q_E.logsumexp(0)
            f_E = after[name].sort(descending=True).values
            f_E = f_E / f_E.sum().clamp(min=1e-8)
            out.append(divergence(log_q_E - norm, f_E + 1e-8, self.options.form))
        return torch.stack(out).mean()

    @staticmethod
    def count(group: list[RoutingRecord]) -> Tensor:
        """K sum_t p_te over the tokens that selected e: probabilities before renormalisation, (E,)."""
        total = []
        for r in group:
            p_TE, selected_TK = r.routing.probs_TE, r.routing.selected_TK
            K = p_TE.shape[1] if selected_TK is None else selected_TK.shape[1]
            if selected_TK is not None:
                p_TE = p_TE * torch.zeros_like(p_TE).scatter(-1, selected_TK, 1.0)
            total.append(K * (r.mask_T.to(p_TE.dtype) @ p_TE))
        return torch.stack(total).sum(0)

    @staticmethod
    def curve(sigma: Tensor, E: int) -> Tensor:
        """log N(i; E/2, σ²) for i = 0..E-1 in falling order, up to a constant."""
        i_E = torch.arange(E, device=sigma.device, dtype=sigma.dtype)
        return (-0.5 * ((i_E - E / 2) / sigma) ** 2 - sigma.log()).sort(descending=True).values


@register("normal")
@dataclass
class Normal(Balance):
    """sum_i q_i |log(q_i / f_i)|, q_i ∝ N(i; E/2, σ²) sorted, f the sorted shares of the counts; the mean over groups.

    GraphLoRA/GMoE (arXiv 2412.16216, equations 8 and 9), in the absolute form of the released code. The counts add
    K sum_t p_te over the tokens that selected expert e, while training and without pads, and are saved. σ starts at E/2
    and is trained.

    Attributes:
        form: ``abs`` as released, ``kl`` as in the paper.
        memory: ``cumulative``: counts of all training; ``ema``: older ones fade by ``decay`` per micro-step.
        decay: of the counts per micro-step with ``memory: ema``.
        compat: ``published``: q is normalised once over all groups, as the released code does. Each group's q then sums
            to 1/G and the target repels.
    """

    weight: float = 8.0
    form: Form = "abs"
    memory: Literal["cumulative", "ema"] = "cumulative"
    decay: float = 0.99
    compat: Literal["none", "published"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        return NormalLoss(layers, self)
