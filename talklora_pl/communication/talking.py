"""TalkLoRA's talking: one matrix mixes the experts of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from talklora_pl.communication import Communication, CommunicationModule
from talklora_pl.registry import register
from talklora_pl.spec import LayerSpec


class TalkingModule(CommunicationModule):
    """m'_i = sum_j C_ij m_j, with C (E,E)."""

    def __init__(self, layer: LayerSpec, features: int, options: Talking) -> None:
        super().__init__(features)
        E = layer.num_experts
        if options.init == "identity":
            self.C = nn.Parameter(torch.eye(E, device=layer.device, dtype=layer.dtype))
        else:
            self.C = layer.uniform(E, E, fan_in=E)

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
        return torch.einsum("ij,tjf->tif", self.C, m_TEF)

    def fold(self, weight_NEG: Tensor) -> Tensor:
        return torch.bmm(self.C.t().expand(len(weight_NEG), -1, -1), weight_NEG)

    def matrix(self, m_TEF: Tensor | None = None) -> Tensor:
        return self.C.detach()


@register("talking")
@dataclass
class Talking(Communication):
    """m'_i = sum_j C_ij m_j, C of shape (E, E), one per layer (TalkLoRA, arXiv 2604.06291).

    Attributes:
        init: ``random`` draws C from U(±1/sqrt(E)) as published; ``identity`` starts as no talk at all.
    """

    init: Literal["random", "identity"] = "random"

    def build(self, layer: LayerSpec, features: int) -> CommunicationModule:
        return TalkingModule(layer, features, self)
