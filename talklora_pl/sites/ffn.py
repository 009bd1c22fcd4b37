"""One adapted feed-forward block: every expert is the whole block with low-rank terms of its own.

T tokens, t tokens of one expert, D input and output width, H hidden width, E experts, K selected, R rank per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from talklora_pl.errors import UserError
from talklora_pl.routing import Routing
from talklora_pl.sites import LowRank, Site
from talklora_pl.sites.dropped import plain_drop
from talklora_pl.sites.experts import FFNExperts
from talklora_pl.sites.gated import GatedFFN, find_gated, gated_ffn
from talklora_pl.sites.grouped import Pairs, can_group
from talklora_pl.sites.linear import fixed_change
from talklora_pl.sites.mixture import BlockMixture, Mixture
from talklora_pl.spec import Bank, LayerOptions, LayerSpec


class AdaptedFFN(Mixture):
    """y = sum_i w_i E_i(x), with gate and up computed once, and mixed before the one frozen down projection.

    E_i(x) = W2 z_i + s B2_i A2_i z_i,  z_i = act(W1 x + s B1_i A1_i x) * (W3 x + s B3_i A3_i x), so that
    y = W2 sum_i w_i z_i + s sum_i B2_i (w_i A2_i z_i): W1, W2 and W3 are used once, however many experts are selected.

    Attributes:
        grouped: selected experts work at once where the dtype allows; off, one after the other.
        recompute: nothing of their hidden states is kept for the backward pass; off, all of it.
    """

    grouped = True
    recompute = True

    def __init__(self, layer: LayerSpec, config: LayerOptions, bank: Bank, parts: GatedFFN) -> None:
        super().__init__(layer, config)
        if config.dropout_output > 0:
            raise UserError(
                "dropout_output: whole-FFN experts replace the block's output, which is not dropped; set it to 0."
            )
        self.parts = parts
        self.scale = config.scale()
        self.dropout_input = config.dropout_input
        self.experts: FFNExperts = config.experts.build(layer, bank)
        self.build_decision(layer, config, self.experts.features)

    def forward(self, frozen: Any, x: Tensor) -> Tensor:
        """Output (..., D) of the adapted block for input (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        e = self.experts
        g_TH, u_TH = self.parts.hidden(frozen, x_TD)
        drop_TD = self._drop(x_TD)
        hg_TER, hu_TER = (
            side.split(F.linear(drop_TD, side.down().to(x_TD.dtype)).to(side.A.dtype)) for side in (e.gate, e.up)
        )
        with torch.autocast(x_TD.device.type, enabled=False):
            routing, m_TEG = self.decide(x_TD, e.node_features(hg_TER, hu_TER), x.shape[:-1])
        if self.experts_see_talk:
            hg_TER, hu_TER = m_TEG.chunk(2, dim=-1)

        hidden = partial(self._one_by_one, frozen, routing)
        if self.grouped and routing.selected_TK is not None and can_group(g_TH.dtype):
            pairs = Pairs(routing.selected_TK, routing.weights_TE.shape[1])
            hidden = partial(self._grouped, frozen, routing, pairs)
        mixed_TH, r_TER = self._recomputed(hidden, g_TH, u_TH, hg_TER, hu_TER)
        y_TD = getattr(frozen, self.parts.down)(mixed_TH)
        z_TQ = r_TER.flatten(1) * self.scale
        return torch.addmm(y_TD, z_TQ.to(y_TD.dtype), e.down.up().to(y_TD.dtype)).view(x.shape)

    def _recomputed(self, hidden: Callable[..., tuple[Tensor, Tensor]], *features: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states of all selected experts are several times the base's own: they are computed again in the
        backward pass, from the block's gate and up, and kept for one block at a time."""
        if not (self.recompute and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return hidden(*features)
        random = self.training and self.dropout_input > 0
        if random and features[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return hidden(*features)  # a graph that is being recorded cannot set random numbers back
        out: tuple[Tensor, Tensor] = checkpoint(hidden, *features, use_reentrant=False, preserve_rng_state=random)
        return out

    def _one_by_one(
        self, frozen: Any, routing: Routing, g_TH: Tensor, u_TH: Tensor, hg_TER: Tensor, hu_TER: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sum_i w_i z_i, (T,H), and w_i A2_i z_i, (T,E,R); each expert by itself, on the tokens that chose it."""
        e, act = self.experts, self.parts.activation(frozen)
        mixed_TH = torch.zeros_like(g_TH)
        r_ETR = []
        for i in range(routing.weights_TE.shape[1]):
            # an expert that no token chose works on zero tokens, so that its gradient is zero and not missing
            mine_t = None if routing.selected_TK is None else (routing.selected_TK == i).any(-1).nonzero().squeeze(-1)
            g_tH, u_tH, hg_tR, hu_tR, w_t = (
                v if mine_t is None else v[mine_t]
                for v in (g_TH, u_TH, hg_TER[:, i], hu_TER[:, i], routing.weights_TE[:, i])
            )
            z_tH = act(self._add(g_tH, hg_tR, e.gate.B[i])) * self._add(u_tH, hu_tR, e.up.B[i])
            w_t1 = w_t.to(z_tH.dtype).unsqueeze(-1)
            r_tR = w_t1 * F.linear(self._drop(z_tH), e.down.A[i].to(z_tH.dtype))
            if mine_t is None:
                mixed_TH.addcmul_(w_t1, z_tH)
                r_ETR.append(r_tR)
            else:
                mixed_TH.index_add_(0, mine_t, w_t1 * z_tH)
                r_ETR.append(r_tR.new_zeros(len(g_TH), r_tR.shape[1]).index_copy(0, mine_t, r_tR))
        return mixed_TH, torch.stack(r_ETR, dim=1)

    def _grouped(
        self,
        frozen: Any,
        routing: Routing,
        pairs: Pairs,
        g_TH: Tensor,
        u_TH: Tensor,
        hg_TER: Tensor,
        hu_TER: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The same for all experts at once, without a question to the device how many tokens each has."""
        e, act, dtype = self.experts, self.parts.activation(frozen), g_TH.dtype
        g_SH, u_SH = (
            pairs.of_tokens(v_TH) + pairs.product(self.scale * pairs.own(h_TER).to(dtype), side.B.to(dtype))
            for v_TH, h_TER, side in ((g_TH, hg_TER, e.gate), (u_TH, hu_TER, e.up))
        )
        z_SH = act(g_SH) * u_SH
        w_S1 = pairs.own(routing.weights_TE.unsqueeze(-1)).to(dtype)
        r_SR = w_S1 * pairs.product(self._drop(z_SH), e.down.A.to(dtype).mT)
        return pairs.sum_over_experts(w_S1 * z_SH), pairs.put(r_SR, routing.weights_TE.shape[1])

    def node_features(self, x_TD: Tensor) -> Tensor:
        sides = (self.experts.gate, self.experts.up)
        return self.experts.node_features(*(s.split(F.linear(x_TD.to(s.A.dtype), s.down())) for s in sides))

    def _add(self, frozen_tH: Tensor, h_tR: Tensor, B_RH: Tensor) -> Tensor:
        return torch.addmm(frozen_tH, h_tR.to(frozen_tH.dtype), B_RH.to(frozen_tH.dtype), alpha=self.scale)

    def _drop(self, v: Tensor) -> Tensor:
        return plain_drop(v, self.dropout_input) if self.training and self.dropout_input > 0 else v


class FFNSite(Site):
    """Whole gated feed-forward blocks."""

    nonlinear = "whole feed-forward blocks"

    def find(
        self,
        model: nn.Module,
        targets: list[str] | str,
        exclude: list[str] | str,
        layers: list[int] | str | None,
        keep: Container[str] = (),
    ) -> dict[str, nn.Module]:
        return find_gated(model, targets, exclude, layers, keep)

    def widths(self, module: nn.Module) -> tuple[int, ...]:
        outer, hidden = gated_ffn(module).width(module)
        return outer, hidden, outer

    def build(
        self, spec: LayerSpec, config: LayerOptions, bank: Bank, module: nn.Module, block: BlockMixture | None
    ) -> Mixture:
        return AdaptedFFN(spec, config, bank, gated_ffn(module))

    def low_rank(self, name: str, layer: nn.Module, w_E: Tensor) -> dict[str, LowRank]:
        assert isinstance(layer, AdaptedFFN)
        experts, parts = layer.experts, layer.parts
        gate, up, down = (fixed_change(e, w_E, layer.scale) for e in (experts.gate, experts.up, experts.down))
        out = {f"{name}.{parts.down}": down}
        if parts.up is not None:
            return out | {f"{name}.{parts.gate}": gate, f"{name}.{parts.up}": up}
        both = LowRank(torch.cat([gate.A_PD, up.A_PD]), torch.block_diag(gate.B_PO, up.B_PO))
        return out | {f"{name}.{parts.gate}": both}


FFN = FFNSite()
