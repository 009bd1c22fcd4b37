"""No communication: the control of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from talklora_pl.communication import Communication, CommunicationModule
from talklora_pl.registry import register
from talklora_pl.spec import LayerSpec


class Identity(CommunicationModule):
    """m'_i = m_i."""

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
        return m_TEF

    def fold(self, weight_NEG: Tensor) -> Tensor:
        return weight_NEG


@register("none")
@dataclass
class NoCommunication(Communication):
    """Experts do not communicate: m'_i = m_i."""

    identity = True

    def build(self, layer: LayerSpec, features: int) -> CommunicationModule:
        return Identity(features)
