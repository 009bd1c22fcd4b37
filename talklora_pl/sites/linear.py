"""One adapted Linear: experts, communication and router around the frozen layer, in rank space.

T tokens, D input width, O output width, E experts, R rank per expert, F features, P/Q rows of the down/up projection.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talklora_pl.sites import LowRank, Site
from talklora_pl.sites.base_experts import AdaptedExperts, is_mixture, part_widths, parts
from talklora_pl.sites.experts import LinearExperts
from talklora_pl.sites.fused import add_up, frozen_and_down
from talklora_pl.sites.left_out import only_reached
from talklora_pl.sites.mixture import BlockMixture, Mixture, own_features
from talklora_pl.sites.targets import find_targets, widths
from talklora_pl.spec import Bank, LayerOptions, LayerSpec, unregistered


class AdaptedLinear(Mixture):
    """y = W x + s sum_i w_i expert_i(x), with w = router(x, communication(features of the experts)).

    The weights multiply rank features (T,E,R), never expert outputs (T,E,O).

    Args:
        block: decides instead of this layer, where one decision is made for a whole block.
    """

    def __init__(self, layer: LayerSpec, config: LayerOptions, bank: Bank, block: BlockMixture | None = None) -> None:
        super().__init__(layer, config)
        self.scale = config.scale()
        self.dropout_input = config.dropout_input
        self.dropout_output = config.dropout_output
        self.experts: LinearExperts = config.experts.build(layer, bank)
        self._block = () if block is None else unregistered(block)
        if block is None:
            self.build_decision(layer, config, self.experts.features)

    def forward(self, frozen: Any, x: Tensor) -> Tensor:
        """Output (..., O) of the adapted layer for input (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        drop_TD = F.dropout(x_TD, self.dropout_input) if self.training and self.dropout_input > 0 else None
        y_TO, h_TP = frozen_and_down(frozen.frozen_forward, frozen, x_TD, drop_TD, self.experts.down())
        z_TQ = self.rank_space(x_TD, h_TP, x.shape[:-1])
        y_TO = add_up(y_TO, z_TQ, self.experts.up(), self.dropout_output, self.training)
        return y_TO.view(*x.shape[:-1], -1)

    @property
    def decided_by(self) -> str:
        return self._block[0].name if self._block else self.name

    def node_features(self, x_TD: Tensor) -> Tensor:
        return own_features(self.experts, x_TD)

    def rank_space(self, x_TD: Tensor, h_TP: Tensor, leading_shape: torch.Size) -> Tensor:
        """Everything between the down and the up projection: z_TQ, in the dtype of the trained tensors."""
        # small tensors: full precision costs nothing, and selection wants it
        with torch.autocast(x_TD.device.type, enabled=False):
            h_TER = self.experts.split(h_TP.to(self.experts.down().dtype))
            if self._block:
                w_TE = self._block[0].weights()
            else:
                routing, m_TEG = self.decide(x_TD, self.experts.node_features(h_TER), leading_shape)
                w_TE = routing.weights_TE
                if self.experts_see_talk:
                    h_TER = m_TEG
            z_TQ = self.experts.mix(h_TER, w_TE)
            return z_TQ if self.scale == 1 else z_TQ * self.scale


class LinearSite(Site):
    """Single Linears (Conv1D included); the fused experts of a base's own mixture, where the targets name them."""

    in_blocks = True

    def find(
        self,
        model: nn.Module,
        targets: list[str] | str,
        exclude: list[str] | str,
        layers: list[int] | str | None,
        keep: Container[str] = (),
    ) -> dict[str, nn.Module]:
        return only_reached(model, find_targets(model, targets, exclude, layers), targets, keep)

    def widths(self, module: nn.Module) -> tuple[int, ...]:
        if is_mixture(module):
            return part_widths(module, parts(module)[0])[0], part_widths(module, parts(module)[1])[1]
        return widths(module)

    def build(
        self, spec: LayerSpec, config: LayerOptions, bank: Bank, module: nn.Module, block: BlockMixture | None
    ) -> Mixture:
        if is_mixture(module):
            return AdaptedExperts(spec, config, bank, module)
        return AdaptedLinear(spec, config, bank, block)

    def low_rank(self, name: str, layer: nn.Module, w_E: Tensor) -> dict[str, LowRank]:
        if isinstance(layer, AdaptedExperts):
            return layer.low_rank(name)
        assert isinstance(layer, AdaptedLinear)
        return {name: fixed_change(layer.experts, w_E, layer.scale)}


LINEAR = LinearSite()


@torch.no_grad()
def fixed_change(experts: LinearExperts, w_E: Tensor, scale: float) -> LowRank:
    """Rank space is linear once the weights are fixed: its matrix is what it makes of the unit vectors."""
    A_PD = experts.down()
    unit_PP = torch.eye(A_PD.shape[0], device=A_PD.device, dtype=A_PD.dtype)
    w_PE = w_E.to(A_PD).expand(A_PD.shape[0], -1)
    z_PQ = experts.mix(experts.split(unit_PP), w_PE)
    return LowRank(A_PD, scale * z_PQ @ experts.up())
