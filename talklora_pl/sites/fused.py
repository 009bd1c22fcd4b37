"""The two pieces of arithmetic that keep an adapted Linear as cheap as the frozen one.

T tokens, D input width, O output width, P rows of the down projection (usually experts x rank).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


class _FrozenDown(torch.autograd.Function):
    """(x Wᵀ + b, x_drop Aᵀ) as one node, so that dx is made in one pass: dx = dy W, then dx += dh A in place."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, drop_TD: Tensor | None, W_OD: Tensor, b_O: Tensor | None, A_PD: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.dropped = drop_TD is not None
        source_TD = x_TD if drop_TD is None else drop_TD
        ctx.save_for_backward(source_TD if ctx.needs_input_grad[4] else None, W_OD, A_PD)
        return F.linear(x_TD, W_OD, b_O), F.linear(source_TD, A_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor, dh_TP: Tensor) -> tuple[Tensor | None, ...]:
        source_TD, W_OD, A_PD = ctx.saved_tensors
        dx_TD = ddrop_TD = dA_PD = None
        if ctx.needs_input_grad[0]:
            dx_TD = dy_TO @ W_OD
            if not ctx.dropped:
                dx_TD.addmm_(dh_TP, A_PD)
        if ctx.dropped and ctx.needs_input_grad[1]:
            ddrop_TD = dh_TP @ A_PD
        if ctx.needs_input_grad[4]:
            dA_PD = dh_TP.t() @ source_TD
        return dx_TD, ddrop_TD, None, None, dA_PD


def _plain_weight(layer: Any) -> Tensor | None:
    """W_OD of a layer that is nothing but ``x Wᵀ + b`` with a frozen floating-point weight, else None.

    Quantised layers, layers whose forward was replaced and layers that are being trained take the ordinary path.
    """
    if "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    own = layer.frozen_class  # a subclass of Linear may compute something else
    if own not in (nn.Linear, Conv1D):
        return None
    weight, bias = layer.weight, layer.bias
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    W_OD: Tensor = weight.t() if own is Conv1D else weight
    return W_OD


def frozen_and_down(
    frozen: Any, layer: Any, x_TD: Tensor, drop_TD: Tensor | None, A_PD: Tensor
) -> tuple[Tensor, Tensor]:
    """Frozen output y_TO and rank features h_TP of one layer; y may be written to in place.

    Args:
        frozen: the layer's own forward, for the ordinary path.
        layer: the frozen layer, see :class:`~talklora_pl.adapter.host.Adapted`.
        x_TD: its input.
        drop_TD: the input of the adapter where it differs (dropout), else None.
        A_PD: all down projections, stacked.
    """
    autocast = torch.is_autocast_enabled(x_TD.device.type)
    W_OD = None if autocast else _plain_weight(layer)
    source_TD = x_TD if drop_TD is None else drop_TD
    if torch.compiler.is_compiling():  # which fuses by itself, and not what is written by hand
        return frozen(x_TD), F.linear(source_TD, A_PD.to(source_TD.dtype))
    if W_OD is None or W_OD.dtype != x_TD.dtype:
        y_TO = frozen(x_TD)
        # such a layer may return a view or keep its output for its own backward: only a copy is ours to write to
        return y_TO.clone(), F.linear(source_TD, A_PD.to(source_TD.dtype))
    y_TO, h_TP = _FrozenDown.apply(x_TD, drop_TD, W_OD, layer.bias, A_PD.to(x_TD.dtype))
    return y_TO, h_TP


def add_up(y_TO: Tensor, z_TQ: Tensor, B_QO: Tensor, dropout: float, training: bool) -> Tensor:
    """y + z B, accumulated in place into the frozen output; with output dropout y + drop(z B)."""
    z_TQ, B_QO = z_TQ.to(y_TO.dtype), B_QO.to(y_TO.dtype)
    if dropout > 0 and training:
        return y_TO + F.dropout(z_TQ @ B_QO, dropout)
    if torch.compiler.is_compiling():
        return torch.addmm(y_TO, z_TQ, B_QO)
    return y_TO.addmm_(z_TQ, B_QO)
