"""Scores of the experts, the part that all routers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talklora_pl.routers import Router, RouterModule
from talklora_pl.routing import Routing
from talklora_pl.spec import LayerSpec

ScoreSource = Literal["auto", "x", "features", "per_expert"]
ScoreInit = Literal["kaiming", "glorot", "normal"]


class Scores(nn.Module):
    """logits_TE from what a router looks at, over the temperature; fp32 at least, whatever the base's dtype.

    ======================  =============================================  ============
    source                  logits                                         weight
    ======================  =============================================  ============
    ``x``                   G x                                            (E, D)
    ``features``            G concat(m_1 .. m_E)  (TalkLoRA)               (E, E F)
    ``per_expert``          g · m_i, one g for all experts (GraphLoRA)     (1, F)
    ======================  =============================================  ============
    """

    def __init__(self, layer: LayerSpec, features: int, options: Scored) -> None:
        super().__init__()
        self.source = options.source(layer.communicates)
        self.temperature = options.temperature
        self.num_experts = layer.num_experts
        rows = 1 if self.source == "per_expert" else layer.num_experts
        width = {"x": layer.in_features, "features": layer.num_experts * features, "per_expert": features}[self.source]
        if options.init == "glorot":
            self.weight = layer.glorot(rows, width)
        elif options.init == "normal":
            self.weight = layer.normal(rows, width, std=0.02)
        else:
            self.weight = layer.uniform(rows, width, fan_in=width)

    def forward(self, x_TD: Tensor, m_TEF: Tensor) -> Tensor:
        return self.heated(self.project(x_TD, m_TEF, self.weight))

    def heated(self, logits_TE: Tensor) -> Tensor:
        """Logits over the temperature."""
        return logits_TE if self.temperature == 1 else logits_TE / self.temperature

    def on_features(self) -> Tensor | None:
        """The weight as one on the features of all experts, (E,E,F), logits first; None if these come from x."""
        if self.source == "x":
            return None
        if self.source == "features":
            return self.weight.view(self.num_experts, self.num_experts, -1)
        one_EE = torch.eye(self.num_experts, device=self.weight.device, dtype=self.weight.dtype)
        return one_EE.unsqueeze(-1) * self.weight

    def project(self, x_TD: Tensor, m_TEF: Tensor, weight: Tensor) -> Tensor:
        """What the router looks at, times a weight of the shape above."""
        if self.source == "x":
            logits_TE = F.linear(x_TD.to(weight.dtype), weight)
        elif self.source == "features":
            logits_TE = F.linear(m_TEF.flatten(1), weight)
        else:
            logits_TE = F.linear(m_TEF, weight).squeeze(-1)
        return logits_TE if logits_TE.dtype.itemsize >= 4 else logits_TE.float()


@dataclass
class Scored(Router):
    """Options of all routers whose logits come from :class:`Scores`.

    Attributes:
        scores: what the logits come from; ``auto`` is ``features`` where experts communicate, else ``x``.
        temperature: > 0; the logits are divided by it.
        init: of the weight: U(±1/sqrt(fan in)), Glorot uniform (GraphLoRA) or N(0, 0.02²) (MixLoRA).
    """

    scores: ScoreSource = "auto"
    temperature: float = 1.0
    init: ScoreInit = "kaiming"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")

    def source(self, communicates: bool) -> str:
        """``scores`` with ``auto`` resolved."""
        if self.scores == "auto":
            return "features" if communicates else "x"
        return self.scores

    def uses_features(self, communicates: bool) -> bool:
        return self.source(communicates) != "x"


class ScoredRouter(RouterModule):
    """A router whose logits come from :class:`Scores`.

    Class attributes:
        selects: it compares logits, so those of bfloat16 products would not do.
    """

    selects: ClassVar[bool] = False

    def __init__(self, layer: LayerSpec, features: int, options: Scored) -> None:
        super().__init__()
        self.scores = Scores(layer, features, options)

    def start_even(self) -> str | None:
        """Equal scores; gradients reach the weight, and what comes before it from the second step on."""
        nn.init.zeros_(self.scores.weight)
        return None

    def forward(self, x_TD: Tensor, m_TEF: Tensor) -> Routing:
        return self.route(self.scores(x_TD, m_TEF))

    def route(self, logits_TE: Tensor) -> Routing:
        """The decision, from the logits. (A router whose decision needs more overrides ``forward``.)"""
        raise NotImplementedError  # each router that starts from logits defines it, or its own forward
