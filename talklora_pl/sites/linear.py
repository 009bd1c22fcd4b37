"""One adapted Linear: experts, communication and router around the frozen layer, in rank space.

T tokens, D input width, O output width, E experts, R rank per expert, F features, P/Q rows of the down/up projection.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talklora_pl.sites import LowRank, Site, folding
from talklora_pl.sites.base_experts import AdaptedExperts, is_mixture, part_widths, parts
from talklora_pl.sites.experts import LinearExperts
from talklora_pl.sites.fused import add_up, frozen_and_down, weigh
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
        scale, B_QO = self.scale, None
        if self.fold and self._is_uniform():
            y_TO, z_TQ = self._uniform(frozen, x_TD, drop_TD, x.shape[:-1])
            scale *= self.router.share
        elif self.fold and self._folds(x_TD):
            y_TO, z_TQ = self._folded(frozen, x_TD, drop_TD, x.shape[:-1])
        else:
            y_TO, h_TP = frozen_and_down(frozen.frozen_forward, frozen, x_TD, drop_TD, self.experts.down())
            h_TER, w_TE = self.rank_space(x_TD, h_TP, x.shape[:-1])
            if self.fold and folding.offers(self.experts, "fold"):
                if not self.experts_see_talk:
                    h_TER = self.experts.split(h_TP)
                z_TQ, B_QO = weigh(h_TER, w_TE).flatten(1), folding.up_rows(self.experts)
            else:
                with torch.autocast(x_TD.device.type, enabled=False):
                    z_TQ = self.experts.mix(h_TER, w_TE)
        B_QO = self.experts.up() if B_QO is None else B_QO
        y_TO = add_up(y_TO, z_TQ, B_QO, scale, self.dropout_output, self.training)
        return y_TO.view(*x.shape[:-1], -1)

    @property
    def decided_by(self) -> str:
        return self._block[0].name if self._block else self.name

    def _is_uniform(self) -> bool:
        """Whether no token needs weights of its own."""
        if self._block or self.experts_see_talk or not folding.offers(self.experts, "fold"):
            return False
        if not isinstance(getattr(self.router, "share", None), float) or (self.training and self.dropout_routing > 0):
            return False
        return not (folding.is_watched(self.router) or folding.is_watched(self.communication))

    def _uniform(
        self, frozen: Any, x_TD: Tensor, drop_TD: Tensor | None, leading_shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """y_TO and z_TQ of experts that all count the same; the layer multiplies by their share."""
        with torch.autocast(x_TD.device.type, enabled=False):
            rank_PD = folding.rank_rows(self.experts)
        y_TO, h_TP = frozen_and_down(frozen.frozen_forward, frozen, x_TD, drop_TD, rank_PD)
        z_TER = self.experts.split(h_TP)
        if self.collectors:
            self.observed(self.router(x_TD, z_TER), leading_shape)
        return y_TO, z_TER.flatten(1)

    def _folds(self, x_TD: Tensor) -> bool:
        if self._block:
            return folding.offers(self.experts, "fold")
        if self.experts_see_talk or not folding.folds(self.experts, self.communication, self.router):
            return False
        return folding.exact_enough(self.router, x_TD)

    def _folded(
        self, frozen: Any, x_TD: Tensor, drop_TD: Tensor | None, leading_shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """y_TO and z_TQ with all that is linear in the one down product: what :meth:`rank_space` computes."""
        with torch.autocast(x_TD.device.type, enabled=False):
            experts = self.experts
            bias_E = from_x_ED = None
            if self._block:
                rows_MD = folding.rank_rows(experts)
                width = len(rows_MD)
            else:
                weight_EP, bias_E = folding.scores(experts, self.communication, self.router)
                if weight_EP is None:
                    from_x_ED, rows_MD = self.router.scores.weight, folding.rank_rows(experts)
                    width = len(rows_MD)
                    if drop_TD is None:  # else the logits are those of x, and h is that of what dropout left of it
                        rows_MD = torch.cat([rows_MD, from_x_ED])
                else:
                    rows_MD = folding.rank_and_score_rows(experts, weight_EP)
                    width = len(rows_MD) - len(weight_EP)
        y_TO, product_TM = frozen_and_down(frozen.frozen_forward, frozen, x_TD, drop_TD, rows_MD)
        with torch.autocast(x_TD.device.type, enabled=False):
            if self._block:
                return y_TO, weigh(experts.split(product_TM), self._block[0].weights()).flatten(1)
            if width < len(rows_MD):
                h_TP, score_TE = folding.split(product_TM, width)
            else:
                h_TP, score_TE = product_TM, F.linear(x_TD, from_x_ED.to(x_TD.dtype))
            routing = self.router.route(folding.logits(self.router, score_TE, bias_E))
            w_TE = self.observed(routing, leading_shape).weights_TE
            return y_TO, weigh(experts.split(h_TP), w_TE).flatten(1)

    def node_features(self, x_TD: Tensor) -> Tensor:
        return own_features(self.experts, x_TD)

    def rank_space(self, x_TD: Tensor, h_TP: Tensor, leading_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """What the experts know of every token, h_TER, in the dtype of the trained tensors, and their weights w_TE."""
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
            return h_TER, w_TE


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
