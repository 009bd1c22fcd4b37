"""One adapted Linear: experts, communication and router around the frozen layer, in rank space.

T tokens, D input width, O output width, E experts, R rank per expert, F features, P/Q rows of the down/up projection.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.internals.torch import in_backward
from talklora_pl.kept import Kept
from talklora_pl.sites import LowRank, Site, folding
from talklora_pl.sites.base_experts import AdaptedExperts, is_mixture, part_widths, parts
from talklora_pl.sites.experts import LinearExperts
from talklora_pl.sites.fused import add_up, fork, frozen_and_down, used_dtype, weigh, without_autocast
from talklora_pl.sites.left_out import only_reached
from talklora_pl.sites.matrices import Made, Matrices, Way
from talklora_pl.sites.mixture import BlockMixture, Mixture, own_features
from talklora_pl.sites.ready import ReadyLayer
from talklora_pl.sites.targets import find_targets, widths
from talklora_pl.spec import Bank, LayerOptions, LayerSpec, unregistered


class AdaptedLinear(Mixture):
    """y = W x + s sum_i w_i expert_i(x), with w = router(x, communication(features of the experts)).

    The weights multiply rank features (T,E,R), never expert outputs (T,E,O).

    Args:
        block: decides instead of this layer, where one decision is made for a whole block.

    Attributes:
        made: matrices that were made together with those of equal layers, see :mod:`talklora_pl.sites.together`.
        ready: what has been found out for scoring and generating, see :mod:`talklora_pl.sites.ready`.
    """

    made: Made | None = None
    ready: ReadyLayer | None = None

    def __init__(self, layer: LayerSpec, config: LayerOptions, bank: Bank, block: BlockMixture | None = None) -> None:
        super().__init__(layer, config)
        self.scale = config.scale()
        self.dropout_input = config.dropout_input
        self.dropout_output = config.dropout_output
        self.experts: LinearExperts = config.experts.build(layer, bank)
        self._kept: Kept[Matrices] = Kept()
        self._places: list[tuple[dict[str, Any], str]] = []
        self._block = () if block is None else unregistered(block)
        if block is None:
            self.build_decision(layer, config, self.experts.features)

    @property
    def dropout_input(self) -> float:
        """Share of the adapter's input that is dropped in training."""
        return self._dropped_of_a_billion / 10**9

    @dropout_input.setter
    def dropout_input(self, share: float) -> None:
        # a whole number is a constant to the compiler; a float would be an input of its code, in double precision
        self._dropped_of_a_billion = round(share * 10**9)

    def forward(self, frozen: Any, x: Tensor) -> Tensor:
        """Output (..., O) of the adapted layer for input (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        ready = None
        if not torch.compiler.is_compiling() and self.ready is not None:
            ready = self.ready.get(frozen, x_TD)
        if ready is not None and ready.parts and not self.collectors:
            return ready.folded(x_TD).view(*x.shape[:-1], -1)
        if ready is not None:
            way, m = ready.way, ready.matrices
            y_TO, product_TM = ready.frozen_and_down(x_TD)
        else:
            dropout = self.dropout_input if self.training else 0.0
            dtype = used_dtype(x_TD)
            way = self.way(dtype)
            m = self._matrices_for(way, dtype)
            y_TO, product_TM = frozen_and_down(frozen.frozen_forward, frozen, x_TD, dropout, m.down_MD, m.whole)
        with without_autocast(x_TD.device.type):
            if way == "uniform":
                z_TQ = self._uniform(x_TD, product_TM, x.shape[:-1])
            elif way == "folded":
                z_TQ = self._folded(product_TM, m, x.shape[:-1])
            else:
                z_TQ = self._plain(x_TD, product_TM, way, x.shape[:-1])
        if ready is not None:
            y_TO = ready.add_up(y_TO, z_TQ)
        else:
            y_TO = add_up(y_TO, z_TQ, m.up_QO, m.scale, self.dropout_output, self.training)
        return y_TO.view(*x.shape[:-1], -1)

    def way(self, dtype: torch.dtype) -> Way:
        """What is computed in rank space, where tokens are multiplied in ``dtype``."""
        if self.fold and self._is_uniform():
            return "uniform"
        if self.fold and self._folds(dtype):
            return "folded"
        return "weighed" if self.fold and folding.offers(self.experts, "fold") else "plain"

    def _matrices_for(self, way: Way, dtype: torch.dtype) -> Matrices:
        """The layer's matrices: with gradients those made together with other layers', if there are; without them
        folded and cast once, and kept until a trained tensor changes."""
        if torch.compiler.is_compiling():
            return self.matrices(way, dtype, fused=False)
        if self.training or torch.is_grad_enabled():
            if self.made is not None:
                if self.made.fits(way, dtype, self.sources()):
                    return self.made.matrices
                if not in_backward():  # a checkpoint's second pass does what the first did
                    self.made = None
            return self.matrices(way, dtype)
        return self.kept(way, dtype)

    def kept(self, way: Way, dtype: torch.dtype) -> Matrices:
        """The layer's matrices folded and cast, without gradients, and kept until a trained tensor changes."""
        return self._kept.get(self.sources(), lambda: self.matrices(way, dtype).ready(dtype), (dtype, way))

    def sources(self) -> list[Tensor]:
        """The tensors that matrices come from."""
        return [p[name] for p, name in self._sources()]

    def _sources(self) -> list[tuple[dict[str, Any], str]]:
        """Where these are; not themselves, as they may be exchanged."""
        if not self._places:
            parts: list[Any] = [self, *getattr(self.experts, "shared", ())]
            modules = [m for part in parts for m in part.modules()]
            self._places = [(m._parameters, n) for m in modules for n, p in m._parameters.items() if p is not None]
        return self._places

    def matrices(self, way: Way, dtype: torch.dtype, fused: bool = True) -> Matrices:
        """The formula of what multiplies the tokens; ``fused``: by nodes of the graph that are written by hand."""
        experts = self.experts
        router: Any = self.router if self.decides else None  # whose options are known once it folds
        with without_autocast(experts.down().device.type):
            if way == "weighed":
                return Matrices(*folding.down_and_up_rows(experts, self.scale, dtype, fused))
            m = Matrices(experts.down(), experts.up(), self.scale)
            if way == "plain":
                return m
            if way == "uniform":
                return m._replace(down_MD=folding.rank_rows(experts), scale=self.scale * router.share)
            if self._block:
                return m._replace(down_MD=folding.rank_rows(experts))
            weight_EP, bias_E = folding.scores(experts, self.communication, router)
            if weight_EP is not None:
                down_MD = folding.rank_and_score_rows(experts, weight_EP, fused)
                return m._replace(down_MD=down_MD, scores=len(weight_EP), bias_E=bias_E)
            scores_ED = router.scores.weight
            down_MD = torch.cat([folding.rank_rows(experts), scores_ED])
            # the logits are those of x, and h is that of what dropout left of it
            return m._replace(down_MD=down_MD, scores=len(scores_ED), whole=len(scores_ED))

    @property
    def decided_by(self) -> str:
        return self._block[0].name if self._block else self.name

    def _is_uniform(self) -> bool:
        """Whether no token needs weights of its own."""
        if self._block or self.experts_see_talk or self.router.share is None:
            return False
        if (self.training and self.dropout_routing > 0) or not folding.offers(self.experts, "fold"):
            return False
        return not (folding.is_watched(self.router) or folding.is_watched(self.communication))

    def _uniform(self, x_TD: Tensor, h_TP: Tensor, leading_shape: torch.Size) -> Tensor:
        """z_TQ of experts that all count the same; their share is in the scale."""
        z_TER = self.experts.split(h_TP)
        if self.collectors or torch.compiler.is_compiling():  # whose layers do not ask who listens
            self.observed(self.router(x_TD, z_TER), leading_shape)
        return z_TER.flatten(1)

    def _folds(self, dtype: torch.dtype) -> bool:
        if self._block:
            return folding.offers(self.experts, "fold")
        if self.experts_see_talk or not folding.folds(self.experts, self.communication, self.router):
            return False
        return folding.exact_enough(self.router, dtype)

    def _folded(self, product_TM: Tensor, m: Matrices, leading_shape: torch.Size) -> Tensor:
        """z_TQ with all that is linear in the one down product: what :meth:`_plain` computes."""
        if self._block:
            return weigh(self.experts.split(product_TM), self._block[0].weights()).flatten(1)
        h_TP, score_TE = folding.split(product_TM, product_TM.shape[1] - m.scores)
        router: Any = self.router
        routing = router.route(folding.logits(router, score_TE, m.bias_E))
        w_TE = self.observed(routing, leading_shape).weights_TE
        return weigh(self.experts.split(h_TP), w_TE).flatten(1)

    def _plain(self, x_TD: Tensor, h_TP: Tensor, way: Way, leading_shape: torch.Size) -> Tensor:
        """z_TQ, one part of the method after the other; in full precision, which selection wants."""
        dtype = self.experts.down().dtype
        if way == "weighed" and not self.experts_see_talk:
            # h goes on in the dtype it came in
            h_TER, full_TER, below = fork(self.experts.split(h_TP), dtype)
            return weigh(h_TER, self._weights(x_TD, full_TER, leading_shape)[0], below).flatten(1)
        h_TER = self.experts.split(h_TP.to(dtype))
        w_TE, m_TEG = self._weights(x_TD, h_TER, leading_shape)
        h_TER = m_TEG if self.experts_see_talk else h_TER
        return weigh(h_TER, w_TE).flatten(1) if way == "weighed" else self.experts.mix(h_TER, w_TE)

    def _weights(self, x_TD: Tensor, h_TER: Tensor, leading_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """w_TE, and the features after communication."""
        if self._block:
            return self._block[0].weights(), h_TER
        routing, m_TEG = self.decide(x_TD, self.experts.node_features(h_TER), leading_shape)
        return routing.weights_TE, m_TEG

    def train(self, mode: bool = True) -> AdaptedLinear:
        """Forgets what was kept: a training may write to tensors in ways that leave no trace."""
        self._kept.forget()
        if self.ready is not None:
            self.ready.forget()
        self.made = None
        return super().train(mode)

    def node_features(self, x_TD: Tensor) -> Tensor:
        return own_features(self.experts, x_TD)


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
