"""Which loads do we want: one file per auxiliary loss.

T tokens, E experts, K selected experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from talklora_pl.registry import Component, import_siblings
from talklora_pl.routing import RoutingRecord


class BalanceLoss(nn.Module):
    """One auxiliary loss over the routing of all layers. Its parameters and buffers are saved with the adapter."""

    def forward(self, records: Sequence[RoutingRecord]) -> Tensor:
        """The loss (scalar, unweighted) of one micro-step; statistics span all ranks and leave out pads."""
        raise NotImplementedError


@dataclass
class Balance(Component):
    """Family of balance losses.

    Attributes:
        weight: coefficient of the loss.
    """

    family = "balance loss"
    weight: float = 0.01

    @abstractmethod
    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        """The loss of one model, given the number of experts of every routed layer by name."""


import_siblings(__name__)
