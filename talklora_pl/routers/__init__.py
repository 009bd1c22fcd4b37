"""Which experts serve a token: one file per router.

T tokens, D input width, E experts, F features per expert.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from talklora_pl.registry import Component, import_siblings
from talklora_pl.routing import Routing
from talklora_pl.spec import LayerSpec


class RouterModule(nn.Module):
    """Router of one decision.

    Class attributes:
        wants_loads: :meth:`after_optimizer_step` is to be called.

    Attributes:
        share: the weight of every expert for every token, for a layer that multiplies by it without a tensor of
            weights; None where tokens differ.
    """

    wants_loads: ClassVar[bool] = False
    share: float | None = None

    def forward(self, x_TD: Tensor, m_TEF: Tensor) -> Routing:
        """Weights of the experts for every token. Tokens never influence each other.

        Args:
            x_TD: the layer's input, without dropout.
            m_TEF: features of every expert, after communication.
        """
        raise NotImplementedError  # each router defines it

    def start_even(self) -> str | None:
        """Have every expert of every token weigh 1/E, from where training goes on; or why that cannot be."""
        return "has no start at which all experts of every token weigh the same"

    def after_optimizer_step(self, load_E: Tensor) -> None:
        """Called after every optimiser step with each expert's selections in its whole global batch, pads left out."""


@dataclass
class Router(Component):
    """Family of routers.

    Attributes:
        per: ``linear``: every adapted Linear decides for itself; ``block``: one decision, made from the input of the
            module that contains them (attention, feed-forward), is shared by all Linears of that module.
    """

    family = "router"
    per: Literal["linear", "block"] = field(default="linear", kw_only=True)

    def uses_features(self, communicates: bool) -> bool:
        """Whether the decision depends on the features of the experts.

        Args:
            communicates: they communicate before.
        """
        return True

    @abstractmethod
    def build(self, layer: LayerSpec, features: int) -> RouterModule:
        """The router of one layer whose experts have ``features`` features each, after communication."""


import_siblings(__name__)
