"""What a site's layer asks of the experts that were built for it.

T tokens, E experts, R rank per expert, F features per expert, P = rows of the down projection, Q = rows of the up
projection.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ExpertsModule(nn.Module):
    """Experts of one layer.

    Attributes:
        features: F, width of the features of one expert, which communication and router can use.
    """

    features: int


class LinearExperts(ExpertsModule):
    """Experts of one Linear. The layer's path is: h = x Aᵀ, features, mix, y += z B. Every kind defines the methods
    that raise NotImplementedError here.

    One whose ``mix`` only weighs h, or C h with a parameter ``core`` C of shape (E,S,R), and whose features are affine
    in h, may define ``fold(weight_NEF) -> (weight_NP, bias_N)`` as well: the weights on h that give what ``weight_NEF``
    gives on the node features, with a bias or None. See :mod:`talklora_pl.sites.folding`.
    """

    def down(self) -> Tensor:
        """A_PD, all down projections stacked."""
        raise NotImplementedError  # each kind of experts defines it

    def split(self, h_TP: Tensor) -> Tensor:
        """h_TP -> h_TER, the rank features of every expert."""
        raise NotImplementedError  # each kind of experts defines it

    def node_features(self, h_TER: Tensor) -> Tensor:
        """h_TER -> m_TEF, what communication and router see: the rank features unless a kind needs something else."""
        return h_TER

    def mix(self, h_TER: Tensor, w_TE: Tensor) -> Tensor:
        """h_TER weighted in rank space -> z_TQ. A kind with a core applies it first."""
        return (h_TER * w_TE.unsqueeze(-1)).flatten(1)

    def up(self) -> Tensor:
        """B_QO, all up projections stacked."""
        raise NotImplementedError  # each kind of experts defines it


class FFNExperts(ExpertsModule):
    """Experts of a whole feed-forward block: three :class:`LinearExperts` with ``A`` (E,R,·) and ``B`` (E,R,·)."""

    gate: Any
    up: Any
    down: Any

    def node_features(self, gate_TER: Tensor, up_TER: Tensor) -> Tensor:
        """m_TEF from the rank features of the gate and of the up projection."""
        raise NotImplementedError  # each kind of experts defines it
