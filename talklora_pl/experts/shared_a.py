"""HydraLoRA's experts: one A for all, a B for each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from talklora_pl.experts import Experts, ExpertsModule, LinearExperts
from talklora_pl.registry import register
from talklora_pl.spec import Bank, LayerSpec


class SharedAExperts(LinearExperts):
    """y += sum_i w_i B_i A x, with one A (R,D) Kaiming and B (E,R,O) zero.

    All experts have the same h. So where features are used, those of expert i are h + e_i with a learned e (E,R), else
    all would be the same; where nobody uses them, there is no e.
    """

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        self.features = layer.rank
        self.A = layer.uniform(layer.rank, layer.in_features, fan_in=layer.in_features)
        self.B = layer.zeros(layer.num_experts, layer.rank, layer.out_features)
        shape = (layer.num_experts, layer.rank)
        self.embedding = layer.uniform(*shape, fan_in=layer.rank) if layer.uses_features else None

    def down(self) -> Tensor:
        return self.A

    def split(self, h_TP: Tensor) -> Tensor:
        return h_TP.unsqueeze(1).expand(-1, self.B.shape[0], -1)

    def node_features(self, h_TER: Tensor) -> Tensor:
        return h_TER if self.embedding is None else h_TER + self.embedding

    def fold(self, weight_NEF: Tensor) -> tuple[Tensor, Tensor | None]:
        bias_N = None if self.embedding is None else (weight_NEF * self.embedding).sum((1, 2))
        return weight_NEF.sum(1), bias_N

    def up(self) -> Tensor:
        return self.B.flatten(0, 1)


@register("shared_a")
@dataclass
class SharedA(Experts):
    """One down projection, n up projections of full rank (HydraLoRA, arXiv 2404.19245)."""

    def build(self, layer: LayerSpec, bank: Bank) -> ExpertsModule:
        return SharedAExperts(layer)
