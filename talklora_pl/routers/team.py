"""TeamLoRA's router: the probabilities themselves are mixed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from talklora_pl.registry import register
from talklora_pl.routers import RouterModule
from talklora_pl.routers.scores import Scored, ScoredRouter
from talklora_pl.routing import Routing
from talklora_pl.spec import LayerSpec


class TeamRouter(ScoredRouter):
    """v = softmax(logits); w = M v / sum(M v), M (E,E)."""

    def __init__(self, layer: LayerSpec, features: int, options: Team) -> None:
        super().__init__(layer, features, options)
        E = layer.num_experts
        self.team = layer.drawn((E, E), lambda M: M.uniform_(-0.1, 0.1).fill_diagonal_(1.0))

    def route(self, logits_TE: Tensor) -> Routing:
        p_TE = logits_TE.softmax(-1)
        v_TE = p_TE @ self.team.to(p_TE.dtype).t()
        return Routing(v_TE / v_TE.sum(-1, keepdim=True), p_TE, logits_TE)

    def start_even(self) -> str | None:
        nn.init.eye_(self.team)
        return super().start_even()


@register("team")
@dataclass
class Team(Scored):
    """Dense softmax whose probabilities a trained matrix mixes before they are renormalised.

    TeamLoRA (arXiv 2408.09856) as the TalkLoRA authors re-implemented it. M starts at U(±0.1) with a unit diagonal;
    weights can become negative, and large where sum(M v) nears 0, as published.
    """

    def build(self, layer: LayerSpec, features: int) -> RouterModule:
        return TeamRouter(layer, features, self)
