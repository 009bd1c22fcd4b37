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
    """One layer's routing in one forward pass; ``mask_T`` is False for pads."""

    layer: str
    routing: Routing
    mask_T: Tensor

    def weight_share(self) -> Tensor:
        """Mean weight of every expert over the real tokens, shape (E,); sums to 1."""
        m_T = self.mask_T.to(self.routing.weights_TE.dtype)
        return (m_T @ self.routing.weights_TE) / m_T.sum().clamp(min=1)

    def selection_share(self) -> Tensor:
        """Share of all selections that went to every expert, shape (E,); dense routers: top-1 choices."""
        chosen_TK = self.routing.selected_TK
        if chosen_TK is None:
            chosen_TK = self.routing.probs_TE.argmax(-1, keepdim=True)
        counts_E = torch.zeros(self.routing.probs_TE.shape[1], device=chosen_TK.device)
        kept = chosen_TK[self.mask_T].reshape(-1)
        counts_E.index_add_(0, kept, torch.ones_like(kept, dtype=counts_E.dtype))
        return counts_E / counts_E.sum().clamp(min=1)


_active: list[RoutingCollector] = []


class RoutingCollector:
    """Collects the routing of every adapted layer that runs inside ``with collector:``.

    Args:
        mask: attention mask (batch, sequence) of the forward pass; 0 marks pads.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask
        self.records: list[RoutingRecord] = []

    def __enter__(self) -> RoutingCollector:
        _active.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _active.pop()

    def add(self, layer: str, routing: Routing, leading_shape: torch.Size) -> None:
        if self.mask is not None and self.mask.shape == leading_shape:
            mask_T = self.mask.reshape(-1).bool()
        else:  # a layer that does not see one row per token, such as a pooler
            mask_T = torch.ones(routing.weights_TE.shape[0], dtype=torch.bool, device=routing.weights_TE.device)
        self.records.append(RoutingRecord(layer, routing, mask_T))


def record(layer: str, routing: Routing, leading_shape: torch.Size) -> None:
    """Hand the routing of one layer to the innermost collector, if there is one."""
    if _active:
        _active[-1].add(layer, routing, leading_shape)
