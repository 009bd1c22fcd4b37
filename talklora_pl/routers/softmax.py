"""Dense routers: every expert counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from talklora_pl.registry import register
from talklora_pl.routers import Router, RouterModule
from talklora_pl.routers.scores import Scored, ScoredRouter
from talklora_pl.routing import Routing
from talklora_pl.spec import LayerSpec


class SoftmaxRouter(ScoredRouter):
    """w = softmax(logits)."""

    def route(self, logits_TE: Tensor) -> Routing:
        w_TE = logits_TE.softmax(-1)
        return Routing(w_TE, w_TE, logits_TE)


@register("softmax")
@dataclass
class Softmax(Scored):
    """Dense: w = softmax(logits) (MoELoRA, HydraLoRA, LoRAMoE; on talked features TalkLoRA)."""

    def build(self, layer: LayerSpec, features: int) -> RouterModule:
        return SoftmaxRouter(layer, features, self)


class UniformRouter(RouterModule):
    """w_i = 1/E."""

    share: float

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        self.num_experts = layer.num_experts
        self.share = 1 / layer.num_experts

    def forward(self, x_TD: Tensor, m_TEF: Tensor) -> Routing:
        w_TE = torch.full((x_TD.shape[0], self.num_experts), self.share, device=m_TEF.device, dtype=m_TEF.dtype)
        return Routing(w_TE, w_TE, torch.zeros_like(w_TE))

    def start_even(self) -> str | None:
        return None


@register("uniform")
@dataclass
class Uniform(Router):
    """No decision: w_i = 1/E for every token. With one expert this is plain LoRA."""

    def uses_features(self, communicates: bool) -> bool:
        return False

    def build(self, layer: LayerSpec, features: int) -> RouterModule:
        return UniformRouter(layer)
