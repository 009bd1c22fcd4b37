"""What can be added to a frozen layer: one file per kind of experts.

T tokens, D input width, O output width, E experts, R rank per expert, F features per expert,
P = rows of the down projection, Q = rows of the up projection.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from talklora_pl.registry import Component, import_siblings
from talklora_pl.sites import Site
from talklora_pl.sites.linear import LINEAR
from talklora_pl.spec import Bank, LayerSpec


class ExpertsModule(nn.Module):
    """Experts of one layer.

    Attributes:
        features: F, width of the features of one expert, which communication and router can use.
    """

    features: int


class LinearExperts(ExpertsModule):
    """Experts of one Linear. The layer's path is: h = x Aᵀ, features, mix, y += z B. Every kind defines the methods
    that raise NotImplementedError here.
    """

    def down(self) -> Tensor:
        """A_PD, all down projections stacked."""
        raise NotImplementedError

    def split(self, h_TP: Tensor) -> Tensor:
        """h_TP -> h_TER, the rank features of every expert."""
        raise NotImplementedError

    def node_features(self, h_TER: Tensor) -> Tensor:
        """h_TER -> m_TEF, what communication and router see: the rank features unless a kind needs something else."""
        return h_TER

    def mix(self, h_TER: Tensor, w_TE: Tensor) -> Tensor:
        """h_TER weighted in rank space -> z_TQ. A kind with a core applies it first."""
        return (h_TER * w_TE.unsqueeze(-1)).flatten(1)

    def up(self) -> Tensor:
        """B_QO, all up projections stacked."""
        raise NotImplementedError


class Experts(Component):
    """Family of expert kinds.

    Class attributes:
        splits_rank: the experts share one rank, each has a slice of it; else each has the full rank.
            Decides the reference of the scale alpha / rank.
        site: what is adapted, a single Linear unless a kind says otherwise, see :mod:`talklora_pl.sites`.
    """

    family = "experts"
    splits_rank: ClassVar[bool] = False
    site: ClassVar[Site] = LINEAR

    @abstractmethod
    def build(self, layer: LayerSpec, bank: Bank) -> ExpertsModule:
        """The experts of one layer: :class:`LinearExperts` for the site of Linears."""


import_siblings(__name__)
