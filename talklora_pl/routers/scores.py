"""Scores of the experts, the part that all routers share."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from talklora_pl.spec import LayerSpec

ScoreSource = Literal["x", "features", "per_expert"]


class Scores(nn.Module):
    """logits_TE from what a router looks at, in the dtype of its weight (fp32 on a bf16 base).

    ======================  =============================================  ============
    source                  logits                                         weight
    ======================  =============================================  ============
    ``x``                   G x                                            (E, D)
    ``features``            G concat(m_1 .. m_E)  (TalkLoRA)               (E, E F)
    ``per_expert``          g · m_i, one g for all experts (GraphLoRA)     (1, F)
    ======================  =============================================  ============
    """

    def __init__(self, layer: LayerSpec, features: int, source: ScoreSource) -> None:
        super().__init__()
        self.source = source
        rows = 1 if source == "per_expert" else layer.num_experts
        width = {"x": layer.in_features, "features": layer.num_experts * features, "per_expert": features}[source]
        self.weight = layer.uniform(rows, width, fan_in=width)

    def forward(self, x_TD: Tensor, m_TEF: Tensor) -> Tensor:
        if self.source == "x":
            return F.linear(x_TD.to(self.weight.dtype), self.weight)
        if self.source == "features":
            return F.linear(m_TEF.flatten(1), self.weight)
        return F.linear(m_TEF, self.weight).squeeze(-1)
