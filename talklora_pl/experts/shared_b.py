"""TalkLoRA's experts: private A and a square core per layer, B shared by all layers of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talklora_pl.experts import Experts, ExpertsModule
from talklora_pl.experts.lora import PrivateA
from talklora_pl.registry import register
from talklora_pl.spec import Bank, LayerSpec, unregistered


class SharedBExperts(PrivateA):
    """y += sum_i w_i B_i C_i A_i x, with A (E,R,D) and the core C (E,R,R) Kaiming, B (E,R,O) zero.

    A layer of E experts uses the first E of its kind's B.
    """

    def __init__(self, layer: LayerSpec, bank: Bank) -> None:
        super().__init__(layer)
        self.core = layer.uniform(layer.num_experts, layer.rank, layer.rank, fan_in=layer.rank)
        shape = (layer.kind_experts, layer.rank, layer.out_features)
        self.shared = unregistered(bank.shared(layer.kind, "B", layer.zeros(*shape)))

    def mix(self, h_TER: Tensor, w_TE: Tensor) -> Tensor:
        z_TES = torch.einsum("ter,esr->tes", h_TER, self.core)
        return super().mix(z_TES, w_TE)

    def fold(self, weight_NEF: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().fold(weight_NEF)  # mix is nothing but the core and the weights

    def up(self) -> Tensor:
        # on a model spread over devices, B lives on one of them
        holder: Any = self.shared[0]
        B_ERO: Tensor = holder.B
        if len(B_ERO) > len(self.A):
            B_ERO = B_ERO[: len(self.A)]
        return B_ERO.flatten(0, 1).to(self.A.device)


@register("shared_b")
@dataclass
class SharedB(Experts):
    """Split rank, square cores, B shared over layers (TalkLoRA, arXiv 2604.06291)."""

    splits_rank = True

    def build(self, layer: LayerSpec, bank: Bank) -> ExpertsModule:
        return SharedBExperts(layer, bank)
