"""Routing is observed, not stored: a layer hands its routing to a collector, inside the collector's context only.

T tokens, E experts, K selected experts.

Outside of the context nothing is kept, so a layer that gradient checkpointing runs a second time is recorded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What a router decides for T tokens.

    Attributes:
        weights_TE: after selection and renormalisation; rows sum to 1.
        probs_TE: before selection.
        logits_TE: scores behind the probabilities.
        selected_TK: indices of the selected experts, best first; None for dense routers.
    """

    weights_TE: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    selected_TK: Tensor | None = None


@dataclass
class RoutingRecord:
    """One layer's routing in one forward pass.

    Attributes:
        layer: full name of the module that decided.
        mask_T: False for pads.
        shape: of the tokens before they were flattened, usually (batch, sequence).
        task_types_B: kind of task of every row of the batch, where the data says so.
    """

    layer: str
    routing: Routing
    mask_T: Tensor
    shape: tuple[int, ...] = ()
    task_types_B: Tensor | None = None

    def weight_share(self) -> Tensor:
        """Mean weight of every expert over the real tokens, shape (E,); sums to 1."""
        m_T = self.mask_T.to(self.routing.weights_TE.dtype)
        return (m_T @ self.routing.weights_TE) / m_T.sum().clamp(min=1)

    def selections(self) -> Tensor:
        """How many real tokens have every expert as their k-th choice, (K, E); dense routers: the top-1, K = 1."""
        chosen_TK = self.routing.selected_TK
        if chosen_TK is None:
            chosen_TK = self.routing.probs_TE.argmax(-1, keepdim=True)
        K, E = chosen_TK.shape[1], self.routing.probs_TE.shape[1]
        flat_TK = chosen_TK + E * torch.arange(K, device=chosen_TK.device)
        mask_TK = self.mask_T.float().unsqueeze(1).expand(-1, K)
        counts = torch.zeros(K * E, device=chosen_TK.device)
        return counts.index_add_(0, flat_TK.reshape(-1), mask_TK.reshape(-1)).view(K, E)

    def selection_share(self) -> Tensor:
        """Share of all selections that went to every expert, shape (E,); dense routers: top-1 choices."""
        counts_E = self.selections().sum(0)
        return counts_E / counts_E.sum().clamp(min=1)


_active: list[RoutingCollector] = []


class RoutingCollector:
    """Collects the routing of every adapted layer that runs inside ``with collector:``.

    Args:
        mask: attention mask (batch, sequence) of the forward pass; 0 marks pads.
        task_types: kind of task of every row (batch,), for losses that ask for it.
    """

    def __init__(self, mask: Tensor | None = None, task_types: Tensor | None = None) -> None:
        self.mask = mask
        self.task_types = task_types
        self.records: list[RoutingRecord] = []

    def __enter__(self) -> RoutingCollector:
        _active.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _active.pop()

    def add(self, layer: str, routing: Routing, leading_shape: torch.Size) -> None:
        # by number, not by shape: some models flatten (batch, sequence) before their feed-forward Linears (OPT)
        if self.mask is not None and self.mask.numel() == routing.weights_TE.shape[0]:
            mask_T, leading_shape = self.mask.reshape(-1).bool(), self.mask.shape
        else:  # a layer that does not see one row per token, such as a pooler
            mask_T = torch.ones(routing.weights_TE.shape[0], dtype=torch.bool, device=routing.weights_TE.device)
        self.records.append(RoutingRecord(layer, routing, mask_T, tuple(leading_shape), self.task_types))


def record(layer: str, routing: Routing, leading_shape: torch.Size) -> None:
    """Hand the routing of one layer to the innermost collector, if there is one."""
    if _active:
        _active[-1].add(layer, routing, leading_shape)
