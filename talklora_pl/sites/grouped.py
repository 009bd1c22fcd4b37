"""Pairs of a token and an expert that it chose, in the order of the experts: one product for all, no host waits.

T tokens, E experts, K chosen per token, S = T K pairs, M and N widths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BYTES = 16
"""What the rows of a grouped product's operands must be a multiple of."""


class Pairs:
    """The pairs of one selection.

    Attributes:
        expert_S, token_S: of every pair.
        order_S: its place among the pairs as they were chosen.
        here_S1: whether the pair's expert is one of these; a number past the last marks one of another process.
        ends_E: where the pairs of every expert end, int32.
        used_E: whether an expert has pairs.
    """

    def __init__(self, selected_TK: Tensor, num_experts: int) -> None:
        expert_S = selected_TK.reshape(-1)
        self.expert_S, self.order_S = expert_S.sort(stable=True)
        self.K = selected_TK.shape[1]
        self.token_S = self.order_S // self.K
        self.here_S1 = (self.expert_S < num_experts).unsqueeze(1)
        self.place_S = torch.empty_like(self.order_S)  # of every pair among the sorted ones
        self.place_S[self.order_S] = torch.arange(len(expert_S), device=expert_S.device)
        one_E = torch.arange(num_experts, device=expert_S.device)
        counts_E = (expert_S.unsqueeze(1) == one_E).sum(0)  # bincount reads its largest value back
        self.ends_E = counts_E.cumsum(0).to(torch.int32)
        self.used_E = counts_E > 0

    def of_tokens(self, v_TM: Tensor) -> Tensor:
        """v_SM: each pair has its token's row."""
        v_SM: Tensor = _OfTokens.apply(v_TM, self)
        return v_SM

    def sum_over_experts(self, v_SM: Tensor) -> Tensor:
        """v_TM: the sum over the pairs of every token."""
        v_TM: Tensor = _SumOverExperts.apply(v_SM, self)
        return v_TM

    def own(self, v_TEM: Tensor) -> Tensor:
        """v_SM: what belongs to the pair's token and expert."""
        return v_TEM.flatten(0, 1).index_select(0, self.token_S * v_TEM.shape[1] + self.expert_S)

    def put(self, v_SM: Tensor, num_experts: int) -> Tensor:
        """v_TEM: the inverse of :meth:`own`, zero where there is no pair."""
        T = len(self.token_S) // self.K
        index_S = self.token_S * num_experts + self.expert_S
        return v_SM.new_zeros(T * num_experts, v_SM.shape[1]).index_copy(0, index_S, v_SM).view(T, num_experts, -1)

    def product(self, v_SM: Tensor, weight_EMN: Tensor) -> Tensor:
        """v_SM times the weight of the pair's expert, (S,N)."""
        # the gradient of a group without rows may be whatever lay in memory
        return self.frozen_product(v_SM, torch.where(self.used_E[:, None, None], weight_EMN, 0))

    def frozen_product(self, v_SM: Tensor, weight_EMN: Tensor) -> Tensor:
        """The same with a weight that has no gradient; rows of pairs that are not here are whatever lay in memory."""
        M, N = weight_EMN.shape[1:]
        more_M, more_N = (-width % (BYTES // v_SM.element_size()) for width in (M, N))
        if more_M or more_N:
            v_SM, weight_EMN = F.pad(v_SM, (0, more_M)), F.pad(weight_EMN, (0, more_N, 0, more_M))
        return F.grouped_mm(v_SM, weight_EMN, offs=self.ends_E)[:, :N]


def can_group(dtype: torch.dtype) -> bool:
    """Whether this version of PyTorch has grouped products in ``dtype``; its compiler knows them in bfloat16 alone."""
    known = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
    return hasattr(F, "grouped_mm") and dtype in known


class _OfTokens(torch.autograd.Function):
    """Rows of tokens for their pairs; its gradient adds the pairs in the order of choice, not in any."""

    @staticmethod
    def forward(ctx: Any, v_TM: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return v_TM.index_select(0, pairs.token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dv_SM: Tensor) -> tuple[Tensor, None]:
        return _sum_of_pairs(dv_SM, ctx.pairs), None


class _SumOverExperts(torch.autograd.Function):
    """The transpose of :class:`_OfTokens`."""

    @staticmethod
    def forward(ctx: Any, v_SM: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return _sum_of_pairs(v_SM, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dv_TM: Tensor) -> tuple[Tensor, None]:
        return dv_TM.index_select(0, ctx.pairs.token_S), None


def _sum_of_pairs(v_SM: Tensor, pairs: Pairs) -> Tensor:
    return v_SM.index_select(0, pairs.place_S).view(-1, pairs.K, v_SM.shape[1]).sum(1)
