"""Balance without a loss: a bias affects selection only; gate values come from the scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from talklora_pl.registry import register
from talklora_pl.routers import RouterModule
from talklora_pl.routers.scores import ScoredRouter
from talklora_pl.routers.top_k import Sparse, selects_too_few
from talklora_pl.routing import Routing
from talklora_pl.spec import LayerSpec


class LossFreeRouter(ScoredRouter):
    """s = sigmoid(logits); select the best K of s + b; w_k = s_k / sum over them of s. b gets no gradient.

    After each optimiser step, from the selections of its whole global batch: b_i += u sign(mean(load) - load_i).
    """

    selects = True
    wants_loads = True
    bias: Tensor

    def __init__(self, layer: LayerSpec, features: int, options: LossFree) -> None:
        super().__init__(layer, features, options)
        self.k = options.k_of(layer)
        self.rate = options.rate
        self.activation = torch.sigmoid if options.activation == "sigmoid" else partial(torch.softmax, dim=-1)
        self.register_buffer("bias", torch.zeros(layer.num_experts, device=layer.device))

    def route(self, logits_TE: Tensor) -> Routing:
        s_TE = self.activation(logits_TE)
        selected_TK = (s_TE.detach() + self.bias).topk(self.k, dim=-1).indices
        s_TK = s_TE.gather(-1, selected_TK)
        w_TK = s_TK / s_TK.sum(-1, keepdim=True)
        w_TE = torch.zeros_like(s_TE).scatter(-1, selected_TK, w_TK)
        return Routing(w_TE, s_TE / s_TE.sum(-1, keepdim=True), logits_TE, selected_TK)

    def start_even(self) -> str | None:
        return super().start_even() or selects_too_few(self.k, len(self.bias))

    @torch.no_grad()
    def after_optimizer_step(self, load_E: Tensor) -> None:
        self.bias += self.rate * (load_E.mean() - load_E).sign().to(self.bias)


@register("loss_free")
@dataclass
class LossFree(Sparse):
    """Auxiliary-loss-free balancing (DeepSeek, arXiv 2408.15664; DeepSeek-V3, 2412.19437).

    Attributes:
        rate: u, by how much the bias of an over- or underloaded expert moves per optimiser step. A fine-tuning run of a
            few hundred steps moves it by less than 1 at the published 0.001: match it to the spread of the scores.
        activation: of the scores, ``sigmoid`` as published or ``softmax``.
    """

    rate: float = 0.001
    activation: Literal["sigmoid", "softmax"] = "sigmoid"

    def build(self, layer: LayerSpec, features: int) -> RouterModule:
        return LossFreeRouter(layer, features, self)
