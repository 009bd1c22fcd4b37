"""What experts tell each other before anyone decides: one file per module.

T tokens, D input width, E experts, F features per expert before, G after communication.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from talklora_pl.registry import Component, import_siblings
from talklora_pl.spec import LayerSpec


class CommunicationModule(nn.Module):
    """Communication of one layer. One that is linear in the features may define ``fold(weight_NEG) -> weight_NEF`` as
    well: the weights on the features before that give what ``weight_NEG`` gives on those after.

    Attributes:
        features: G, width of what it returns per expert. Equal to the F it was built with unless it says otherwise.
    """

    features: int

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
        """Features of every expert after communication, m_TEG. Tokens never influence each other.

        Args:
            m_TEF: features of every expert.
            x_TD: the layer's input, for modules whose graph has a node for the token.
        """
        raise NotImplementedError  # each communication defines it

    def matrix(self, m_TEF: Tensor | None = None) -> Tensor | None:
        """How much expert i takes from expert j, (E, E), for pictures; None where there is no such matrix.

        Args:
            m_TEF: features of the experts, where the matrix depends on it: the mean over tokens is returned.
        """
        return None


class Communication(Component):
    """Family of communication modules.

    Class attributes:
        identity: the module returns what it is given.
    """

    family = "communication"
    identity: ClassVar[bool] = False

    def uses_features(self) -> bool:
        """Whether the result depends on the features of the experts for this token."""
        return True

    @abstractmethod
    def build(self, layer: LayerSpec, features: int) -> CommunicationModule:
        """The module of one layer whose experts have ``features`` features each."""


import_siblings(__name__)
