"""Experts of a token attend to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from talklora_pl.communication import Communication, CommunicationModule
from talklora_pl.communication.arithmetic import Norm, normalise
from talklora_pl.errors import UserError
from talklora_pl.registry import register
from talklora_pl.spec import LayerSpec

MOST = 2**16 - 1
"""Tokens, each of which is a sequence of experts, that one kernel of a GPU takes."""


class AttentionModule(CommunicationModule):
    """m'_i = m_i + O concat_h( sum_j a_hij V_h n_j ),  a_hij = softmax_j( Q_h n_i · K_h n_j / sqrt(d) ),  n = norm(m).

    H heads of width d = F / H; Q, K, V, O of shape (F,F), the same for all experts: nothing depends on their order.
    """

    def __init__(self, layer: LayerSpec, features: int, options: Attention) -> None:
        super().__init__(features)
        self.options = options
        self.qkv = layer.uniform(3 * features, features, fan_in=features)
        self.out = layer.uniform(features, features, fan_in=features)

    def projected(self, m_TEF: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of every head, (T,H,E,d)."""
        T, E, _ = m_TEF.shape
        n_TEF = normalise(m_TEF, self.options.norm)
        qkv = nn.functional.linear(n_TEF, self.qkv).view(T, E, 3, self.options.heads, -1)
        return qkv.permute(2, 0, 3, 1, 4).unbind()

    def matrix(self, m_TEF: Tensor | None = None) -> Tensor | None:
        if m_TEF is None:
            return None
        q, k, _ = self.projected(m_TEF)
        weights: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return weights.mean((0, 1))

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
        T, E, F = m_TEF.shape
        qkv, attend = self.projected(m_TEF), nn.functional.scaled_dot_product_attention
        if T <= MOST:
            heard = attend(*qkv)  # type: ignore[arg-type] # three tensors
        else:
            heard = torch.cat([attend(*few) for few in zip(*(x.split(MOST) for x in qkv), strict=True)])
        update_TEF = nn.functional.linear(heard.transpose(1, 2).reshape(T, E, F), self.out)
        return m_TEF + update_TEF if self.options.residual else update_TEF


@register("attention")
@dataclass
class Attention(Communication):
    """Multi-head self-attention over the experts of a token (Vaswani et al., arXiv 1706.03762, equation 1).

    m_TEF -> m_TEF: m'_i = m_i + O concat_h( sum_j softmax_j( Q_h n_i · K_h n_j / sqrt(F/H) ) V_h n_j ), n = norm(m).

    Attributes:
        heads: H, must divide the number of features (the expert's rank).
        residual: add the result to the features; else replace them.
        norm: of the features before attention, without trained scale: ``none``, ``layer`` or ``rms``.
    """

    heads: int = 1
    residual: bool = True
    norm: Norm = "rms"

    def build(self, layer: LayerSpec, features: int) -> CommunicationModule:
        if self.heads < 1 or features % self.heads:
            raise UserError(
                f"communication 'attention': heads {self.heads} must divide the {features} features of an expert of "
                f"{layer.name!r} (its rank); choose other heads or another expert_rank."
            )
        return AttentionModule(layer, features, self)
