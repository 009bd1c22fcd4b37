"""Experts that are whole gated feed-forward blocks: three LoRA pairs each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from talklora_pl.experts import Experts, ExpertsModule, FFNExperts
from talklora_pl.experts.lora import PrivateExperts
from talklora_pl.registry import register
from talklora_pl.sites.ffn import FFN
from talklora_pl.spec import Bank, LayerSpec


class PrivateFFN(FFNExperts):
    """Pairs (A_i, B_i) of every expert on the gate, the up and the down projection; A Kaiming, B zero.

    Attributes:
        features: F = 2R.
    """

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        self.features = 2 * layer.rank
        inner = replace(layer, out_features=layer.hidden_features)
        self.gate = PrivateExperts(inner)
        self.up = PrivateExperts(inner)
        self.down = PrivateExperts(replace(layer, in_features=layer.hidden_features))

    def node_features(self, gate_TER: Tensor, up_TER: Tensor) -> Tensor:
        """m_TEF: the rank features of gate and up, one after the other."""
        return torch.cat([gate_TER, up_TER], dim=-1)


@register("ffn_lora")
@dataclass
class FFNLoRA(Experts):
    """Whole gated feed-forward blocks (MixLoRA, arXiv 2404.15159; GraphLoRA/GMoE, 2412.16216, equations 2 and 5).

    E_i(x) = W2 z_i + s B2_i A2_i z_i,  z_i = act(W1 x + s B1_i A1_i x) * (W3 x + s B3_i A3_i x);
    the block's output becomes sum_i w_i E_i(x). ``targets`` name the block itself, such as ``mlp``.
    """

    site = FFN

    def build(self, layer: LayerSpec, bank: Bank) -> ExpertsModule:
        return PrivateFFN(layer)
