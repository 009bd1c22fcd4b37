"""Sparse routers: the best K experts of a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from talklora_pl.errors import UserError
from talklora_pl.registry import register
from talklora_pl.routers import RouterModule
from talklora_pl.routers.scores import Scored, ScoredRouter
from talklora_pl.routing import Routing
from talklora_pl.spec import LayerSpec

TIE = 1e-5
"""Logits this close, relative to the token's largest, are equal up to rounding."""


def keep_best(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(weights_TE, selected_TK): softmax over the K largest logits, which is p_k / sum_K p; 0 elsewhere.

    Of experts that are equal up to rounding the first is selected. Two experts that a graph without residual links to
    each other only have equal logits whatever its parameters; whom a token gets must not depend on who multiplies.
    """
    late_E = TIE * torch.arange(logits_TE.shape[-1], device=logits_TE.device, dtype=logits_TE.dtype)
    known_TE = logits_TE.detach()
    selected_TK = (
        (known_TE - late_E * known_TE.abs().nan_to_num(posinf=0).amax(-1, keepdim=True)).topk(k, dim=-1).indices
    )
    best_TK = logits_TE.gather(-1, selected_TK)
    return torch.zeros_like(logits_TE).scatter(-1, selected_TK, best_TK.softmax(-1)), selected_TK


class TopKRouter(ScoredRouter):
    """p = softmax(logits); w_k = p_k / sum over the best K of p, 0 for the others."""

    selects = True

    def __init__(self, layer: LayerSpec, features: int, options: Sparse) -> None:
        super().__init__(layer, features, options)
        self.k = options.k_of(layer)
        self.num_experts = layer.num_experts

    def route(self, logits_TE: Tensor) -> Routing:
        w_TE, selected_TK = keep_best(logits_TE, self.k)
        return Routing(w_TE, logits_TE.softmax(-1), logits_TE, selected_TK)

    def start_even(self) -> str | None:
        return super().start_even() or selects_too_few(self.k, self.num_experts)


def selects_too_few(k: int, experts: int) -> str | None:
    """Why a router that selects ``k`` experts has no even start; None if it selects all."""
    if k >= experts:
        return None
    return f"selects {k} of {experts} experts, so that no token gets the mean of all: softmax does, or k: {experts}"


@dataclass
class Sparse(Scored):
    """Options of all routers that select.

    Attributes:
        k: K, selected experts of a token: one number, a list with one per decoder layer, or a table ``{8: 3, 4: 2}``
            by the layer's number of experts. A layer of fewer experts uses all of them.
    """

    k: int | list[int] | dict[int, int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.k, dict):
            self.k = {int(E): k for E, k in self.k.items()}  # keys of JSON are texts
        numbers = self.k.values() if isinstance(self.k, dict) else self.k if isinstance(self.k, list) else [self.k]
        if min(numbers, default=0) < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def k_of(self, layer: LayerSpec) -> int:
        """K of one layer, at most its number of experts.

        Raises:
            UserError: a list without one number per decoder layer, or a table without the layer's number of experts.
        """
        k, where = self.k, f"router {self.name!r}: k"
        if isinstance(k, list):
            if layer.index is None:
                raise UserError(
                    f"{where} lists one number per decoder layer, and {layer.name!r} is in none; give one number, or a "
                    "table by number of experts."
                )
            if len(k) != layer.num_layers:
                raise UserError(f"{where} lists {len(k)} numbers, but the model has {layer.num_layers} decoder layers.")
            k = k[layer.index]
        elif isinstance(k, dict):
            if layer.num_experts not in k:
                raise UserError(
                    f"{where} has no entry for the {layer.num_experts} experts of {layer.name!r}, only for "
                    f"{', '.join(map(str, sorted(k)))}."
                )
            k = k[layer.num_experts]
        return min(k, layer.num_experts)


@register("top_k")
@dataclass
class TopK(Sparse):
    """The best K of the softmax, renormalised, selected in fp32 (MoLA, arXiv 2402.08562; MixLoRA, 2404.15159)."""

    def build(self, layer: LayerSpec, features: int) -> RouterModule:
        return TopKRouter(layer, features, self)


class NoisyTopKRouter(TopKRouter):
    """logits + N(0,1) softplus(V · what the router looks at), then as top-k; without noise in evaluation."""

    def __init__(self, layer: LayerSpec, features: int, options: NoisyTopK) -> None:
        super().__init__(layer, features, options)
        # zero as published: the noise starts with the standard deviation softplus(0) = ln 2 for every expert
        self.noise = torch.nn.Parameter(torch.zeros_like(self.scores.weight))

    def forward(self, x_TD: Tensor, m_TEF: Tensor) -> Routing:
        logits_TE = self.scores(x_TD, m_TEF)
        # also in evaluation, so that the noise weight has a (zero) gradient whatever the mode
        std_TE = F.softplus(self.scores.project(x_TD, m_TEF, self.noise))
        if self.training:
            logits_TE = logits_TE + torch.randn_like(logits_TE) * std_TE
        else:
            logits_TE = logits_TE + 0 * std_TE
        w_TE, selected_TK = keep_best(logits_TE, self.k)
        return Routing(w_TE, logits_TE.softmax(-1), logits_TE, selected_TK)


@register("noisy_top_k")
@dataclass
class NoisyTopK(Sparse):
    """Top-k with trained noise on the logits while training (Shazeer et al., arXiv 1701.06538, equations 3-5)."""

    def build(self, layer: LayerSpec, features: int) -> RouterModule:
        return NoisyTopKRouter(layer, features, self)
