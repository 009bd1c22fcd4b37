"""One adapted Linear: experts, communication and router around the frozen layer, in rank space.

T tokens, D input width, O output width, E experts, R rank per expert, F features, P/Q rows of the down/up projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talklora_pl.adapter.fused import add_up, frozen_and_down
from talklora_pl.errors import UserError
from talklora_pl.routing import record
from talklora_pl.spec import Bank, LayerSpec

if TYPE_CHECKING:
    from talklora_pl.adapter.config import AdapterConfig


class AdaptedLinear(nn.Module):
    """y = W x + s sum_i w_i expert_i(x), with w = router(x, communication(what the experts say)).

    The weights multiply rank features (T,E,R), never expert outputs (T,E,O).
    """

    def __init__(self, layer: LayerSpec, config: AdapterConfig, bank: Bank) -> None:
        super().__init__()
        self.name = layer.name
        self.scale = config.scale()
        self.dropout_input = config.dropout_input
        self.dropout_routing = config.dropout_routing
        self.dropout_output = config.dropout_output
        self.experts_see_talk = config.experts_see_talk
        # experts first, so that methods that differ only in later parts start from the same A
        self.experts: Any = config.experts.build(layer, bank)
        self.communication: Any = config.communication.build(layer, self.experts.features)
        self.router: Any = config.router.build(layer, self.communication.features)
        if self.experts_see_talk and self.communication.features != layer.rank:
            raise UserError(
                f"experts_see_talk: experts of rank {layer.rank} cannot use the {self.communication.features} features "
                f"per expert that communication {config.communication.name!r} gives; set experts_see_talk to false."
            )

    def forward(self, frozen: Any, x: Tensor) -> Tensor:
        """Output (..., O) of the adapted layer for input (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        drop_TD = F.dropout(x_TD, self.dropout_input) if self.training and self.dropout_input > 0 else None
        y_TO, h_TP = frozen_and_down(frozen.frozen_forward, frozen, x_TD, drop_TD, self.experts.down())
        z_TQ = self.rank_space(x_TD, h_TP, x.shape[:-1])
        y_TO = add_up(y_TO, z_TQ, self.experts.up(), self.dropout_output, self.training)
        return y_TO.view(*x.shape[:-1], -1)

    def rank_space(self, x_TD: Tensor, h_TP: Tensor, leading_shape: torch.Size) -> Tensor:
        """Everything between the down and the up projection: z_TQ, in the dtype of the trained tensors."""
        # small tensors: full precision costs nothing, and selection wants it
        with torch.autocast(x_TD.device.type, enabled=False):
            h_TER = self.experts.split(h_TP.to(self.experts.down().dtype))
            m_TEF = self.communication(self.experts.say(h_TER), x_TD)
            routing = self.router(x_TD, m_TEF)
            record(self.name, routing, leading_shape)
            w_TE = routing.weights_TE
            if self.training and self.dropout_routing > 0:
                w_TE = F.dropout(w_TE, self.dropout_routing)
            z_TQ: Tensor = self.experts.mix(m_TEF if self.experts_see_talk else h_TER, w_TE)
            return z_TQ if self.scale == 1 else z_TQ * self.scale
