"""One decision: communication and router of a Linear, of a feed-forward block, or of all Linears of a block.

T tokens, D input width, E experts, F features per expert, R rank per expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talklora_pl.errors import UserError
from talklora_pl.routing import Collectors, Handed, Routing
from talklora_pl.sites import folding
from talklora_pl.sites.experts import LinearExperts
from talklora_pl.sites.fused import product_dtype, without_autocast
from talklora_pl.spec import LayerOptions, LayerSpec, unregistered

if TYPE_CHECKING:
    from talklora_pl.communication import CommunicationModule
    from talklora_pl.routers import RouterModule


class Mixture(nn.Module):
    """w = router(x, communication(features of the experts)), recorded under the layer's name.

    Attributes:
        collectors: those of the adapter that the layer belongs to, innermost last.
        handed: what compiled code leaves there for them.
        fold: take the folded path where there is one, see :mod:`talklora_pl.sites.folding`; off, the plain one.
    """

    fold = True

    communication: CommunicationModule
    router: RouterModule
    experts: Any  # of the kind that the site's layer knows; a block has none of its own

    def __init__(self, layer: LayerSpec, config: LayerOptions) -> None:
        super().__init__()
        self.name = layer.name
        self.dropout_routing = config.dropout_routing
        self.experts_see_talk = config.experts_see_talk
        self.collectors = Collectors()
        self.handed = Handed()

    def build_decision(self, layer: LayerSpec, config: LayerOptions, features: int) -> None:
        """Make the parts. Experts come before: methods that differ only in later parts then start from the same A."""
        self.communication = config.communication.build(layer, features)
        self.router = config.router.build(layer, self.communication.features)
        if self.experts_see_talk and self.communication.features != features:
            raise UserError(
                f"experts_see_talk: experts with {features} features cannot use the {self.communication.features} "
                f"per expert that communication {config.communication.name!r} gives; set experts_see_talk to false."
            )

    @property
    def decides(self) -> bool:
        """Whether the communication and the router were made."""
        return hasattr(self, "router")

    @property
    def decided_by(self) -> str:
        """Under which name the routing of this layer is recorded."""
        return self.name

    def node_features(self, x_TD: Tensor) -> Tensor:
        """Features of the experts for an input alone, m_TEF: for measurements, which need the decision by itself."""
        raise NotImplementedError  # each site's layer defines it

    def decide(self, x_TD: Tensor, m_TEF: Tensor, leading_shape: torch.Size) -> tuple[Routing, Tensor]:
        """The routing of every token, and the features of the experts after communication."""
        m_TEG = self.communication(m_TEF, x_TD)
        return self.observed(self.router(x_TD, m_TEG), leading_shape), m_TEG

    def observed(self, routing: Routing, leading_shape: torch.Size) -> Routing:
        """The routing as it is applied; whoever collects gets it as it was decided."""
        if torch.compiler.is_compiling():
            self.handed.routing = routing
        elif self.collectors:
            self.collectors[-1].add(self.name, routing, leading_shape)
            if self.training:  # gradient checkpointing runs the layer again outside of the context
                self.collectors.advice = ""
        elif self.collectors.advice and self.training and torch.is_grad_enabled() and self._is_trained():
            self.collectors.give_advice()
        if self.training and self.dropout_routing > 0:
            routing = routing._replace(weights_TE=F.dropout(routing.weights_TE, self.dropout_routing))
        return routing

    def _is_trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters())


class BlockMixture(Mixture):
    """One decision for all adapted Linears of a block, from the block's own input hidden state.

    It takes the place of the block's forward, decides, and lets the block run. So the decision does not depend on the
    order in which the Linears run, and is made again when gradient checkpointing runs the block again. Where the
    decision uses features, they are those of the experts of the first adapted Linear that takes the block's input.
    """

    def __init__(self, layer: LayerSpec, config: LayerOptions) -> None:
        super().__init__(layer, config)
        self.width = layer.in_features
        self.uses_features = layer.uses_features
        self.num_experts = layer.num_experts
        self._experts: tuple[LinearExperts, ...] = ()
        self._routing: Routing | None = None

    def use_features_of(self, experts: LinearExperts, layer: LayerSpec, config: LayerOptions) -> None:
        """Decide by the features of ``experts``, which belong to their own layer."""
        self._experts = unregistered(experts)
        self.build_decision(layer, config, experts.features)

    def weights(self) -> Tensor:
        """w_TE of the forward pass that is running."""
        if self._routing is None:
            raise RuntimeError(f"{self.name}: a Linear of this block ran outside of the block's own forward")
        return self._routing.weights_TE

    def forward(self, frozen: Any, *args: Any, **kwargs: Any) -> Any:
        with self.decided(args[0] if args else kwargs.get("hidden_states")):
            return frozen.frozen_forward(*args, **kwargs)

    @contextmanager
    def decided(self, x: Any) -> Iterator[None]:
        """Inside of it the Linears of the block have the weights for its input (..., D)."""
        if not isinstance(x, Tensor) or x.shape[-1] != self.width:
            raise UserError(
                f"router.per: block: {self.name!r} is not called with hidden states of width {self.width} first; "
                "use router.per: linear for this model."
            )
        outer, self._routing = self._routing, self._decide(x)
        try:
            yield
        finally:
            self._routing = outer

    def node_features(self, x_TD: Tensor) -> Tensor:
        if not self.uses_features:
            return x_TD.new_zeros(x_TD.shape[0], self.num_experts, 0)
        return own_features(self._experts[0], x_TD)

    def _folds(self, dtype: torch.dtype) -> bool:
        if not (self.fold and self._experts and folding.exact_enough(self.router, dtype)):
            return False
        return folding.folds(self._experts[0], self.communication, self.router)

    def _decide(self, x: Tensor) -> Routing:
        x_TD = x.reshape(-1, x.shape[-1])
        with without_autocast(x_TD.device.type):
            if self._folds(product_dtype(x_TD)):
                router: Any = self.router
                logits_TE = folding.logits_of(x_TD, self._experts[0], self.communication, router)
                return self.observed(router.route(logits_TE), x.shape[:-1])
            return self.decide(x_TD, self.node_features(x_TD), x.shape[:-1])[0]


def own_features(experts: LinearExperts, x_TD: Tensor) -> Tensor:
    """m_TEF of the experts of a Linear for its input."""
    A_PD = experts.down()
    return experts.node_features(experts.split(F.linear(x_TD.to(A_PD.dtype), A_PD)))
