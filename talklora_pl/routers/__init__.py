"""Who speaks for this token: one file per router.

T tokens, D input width, E experts, F features per expert.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from talklora_pl.registry import Component, import_siblings
from talklora_pl.routing import Routing
from talklora_pl.spec import LayerSpec


class RouterModule(nn.Module):
    """Router of one layer."""

    def forward(self, x_TD: Tensor, m_TEF: Tensor) -> Routing:
        """Weights of the experts for every token.

        Args:
            x_TD: the layer's input, without dropout.
            m_TEF: what every expert has heard.
        """
        raise NotImplementedError


class Router(Component):
    """Family of routers."""

    family = "router"

    @abstractmethod
    def build(self, layer: LayerSpec, features: int) -> RouterModule:
        """The router of one layer whose experts have heard ``features`` numbers each."""


import_siblings(__name__)
