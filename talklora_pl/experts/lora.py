"""Experts with A and B of their own: full rank each (MoLA, LoRAMoE) or a slice of one rank (MoELoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from talklora_pl.experts import Experts, ExpertsModule, LinearExperts
from talklora_pl.registry import register
from talklora_pl.spec import Bank, LayerSpec


class PrivateA(LinearExperts):
    """Experts with an A of their own, (E,R,D) Kaiming."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__()
        self.features = layer.rank
        self.A = layer.uniform(layer.num_experts, layer.rank, layer.in_features, fan_in=layer.in_features)

    def down(self) -> Tensor:
        return self.A.flatten(0, 1)

    def split(self, h_TP: Tensor) -> Tensor:
        E, R, _ = self.A.shape
        return h_TP.view(*h_TP.shape[:-1], E, R)

    def fold(self, weight_NEF: Tensor) -> tuple[Tensor, Tensor | None]:
        return weight_NEF.flatten(1), None


class PrivateExperts(PrivateA):
    """y += sum_i w_i B_i A_i x, with B (E,R,O) zero."""

    def __init__(self, layer: LayerSpec) -> None:
        super().__init__(layer)
        self.B = layer.zeros(layer.num_experts, layer.rank, layer.out_features)

    def up(self) -> Tensor:
        return self.B.flatten(0, 1)


@register("lora")
@dataclass
class LoRA(Experts):
    """n LoRA pairs of full rank each (arXiv 2402.08562 MoLA, 2312.09979 LoRAMoE; with n = 1 plain LoRA, 2106.09685)."""

    def build(self, layer: LayerSpec, bank: Bank) -> ExpertsModule:
        return PrivateExperts(layer)


@register("split_lora")
@dataclass
class SplitLoRA(Experts):
    """One LoRA pair whose rank is split among n experts (MoELoRA)."""

    splits_rank = True

    def build(self, layer: LayerSpec, bank: Bank) -> ExpertsModule:
        return PrivateExperts(layer)
