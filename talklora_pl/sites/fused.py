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
    """(x Wᵀ + b, drop(x) Aᵀ) as one node, so that dx is made in one pass: dx = dy W, then dx += dh A in place.

    Of dropout only the mask is kept, a byte per number: x itself is kept once for all Linears that it goes into.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, dropout: float, W_OD: Tensor, b_O: Tensor | None, A_PD: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.dropout = dropout
        drop_TD, mask_TD = _drop(x_TD, dropout)
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[4] else None, mask_TD, W_OD, A_PD)
        return F.linear(x_TD, W_OD, b_O), F.linear(drop_TD, A_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor, dh_TP: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, mask_TD, W_OD, A_PD = ctx.saved_tensors
        dx_TD = dA_PD = None
        if ctx.needs_input_grad[0]:
            dx_TD = dy_TO @ W_OD
            if mask_TD is None:
                dx_TD.addmm_(dh_TP, A_PD)
            else:
                dx_TD += _dropped(dh_TP @ A_PD, mask_TD, ctx.dropout)
        if ctx.needs_input_grad[4]:
            dA_PD = dh_TP.t() @ _dropped(x_TD, mask_TD, ctx.dropout)
        return dx_TD, None, None, None, dA_PD


class _DroppedDown(torch.autograd.Function):
    """drop(x) Aᵀ that keeps x and the mask, as :class:`_FrozenDown`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, dropout: float, A_PD: Tensor) -> Tensor:
        ctx.dropout = dropout
        drop_TD, mask_TD = _drop(x_TD, dropout)
        ctx.save_for_backward(x_TD, mask_TD, A_PD)
        return F.linear(drop_TD, A_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TP: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, mask_TD, A_PD = ctx.saved_tensors
        dx_TD = _dropped(dh_TP @ A_PD, mask_TD, ctx.dropout) if ctx.needs_input_grad[0] else None
        return dx_TD, None, dh_TP.t() @ _dropped(x_TD, mask_TD, ctx.dropout)


def _drop(x_TD: Tensor, dropout: float) -> tuple[Tensor, Tensor | None]:
    """What dropout leaves of x, and where it leaves something."""
    return (x_TD, None) if dropout == 0 else torch.native_dropout(x_TD, dropout, True)


def _dropped(v_TD: Tensor, mask_TD: Tensor | None, dropout: float) -> Tensor:
    """The same again, also of a gradient."""
    if mask_TD is None:
        return v_TD
    out_TD: Tensor = torch.ops.aten.native_dropout_backward(v_TD, mask_TD, 1 / (1 - dropout))
    return out_TD


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of a product in ``dtype`` are looked at."""
    return dtype if dtype.itemsize >= 4 else torch.float32


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


def frozen_and_down(frozen: Any, layer: Any, x_TD: Tensor, dropout: float, A_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Frozen output y_TO and rank features h_TP of one layer; y may be written to in place.

    Args:
        frozen: the layer's own forward, for the ordinary path.
        layer: the frozen layer, see :class:`~talklora_pl.adapter.host.Adapted`.
        x_TD: its input.
        dropout: share of the adapter's input that is dropped; 0 while evaluating.
        A_PD: all down projections, stacked.
    """
    if torch.compiler.is_compiling():  # the compiler fuses plain code, and regenerates masks
        source_TD = F.dropout(x_TD, dropout) if dropout > 0 else x_TD
        return frozen(x_TD), F.linear(source_TD, A_PD.to(source_TD.dtype))
    kind = x_TD.device.type
    autocast = torch.is_autocast_enabled(kind)
    W_OD = None if autocast else _plain_weight(layer)
    if W_OD is not None and W_OD.dtype == x_TD.dtype:
        if not torch.is_grad_enabled() and dropout == 0:
            return F.linear(x_TD, W_OD, layer.bias), F.linear(x_TD, A_PD.to(x_TD.dtype))
        y_TO, h_TP = _FrozenDown.apply(x_TD, dropout, W_OD, layer.bias, A_PD.to(x_TD.dtype))
        return y_TO, h_TP
    # such a layer may return a view or keep its output for its own backward: only a copy is ours to write to
    y_TO = frozen(x_TD).clone()
    dtype = torch.get_autocast_dtype(kind) if autocast else x_TD.dtype
    if dropout == 0:
        return y_TO, F.linear(x_TD, A_PD.to(x_TD.dtype))
    with torch.autocast(kind, enabled=False):
        return y_TO, _DroppedDown.apply(x_TD.to(dtype), dropout, A_PD.to(dtype))


class _Weighed(torch.autograd.Function):
    """h w in the dtype of h, without a copy of h in that of w."""

    @staticmethod
    def forward(ctx: Any, h_TER: Tensor, w_TE: Tensor) -> Tensor:
        ctx.save_for_backward(h_TER, w_TE)
        return torch.mul(h_TER, w_TE.unsqueeze(-1), out=h_TER.new_empty(h_TER.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_TER: Tensor) -> tuple[Tensor | None, Tensor | None]:
        h_TER, w_TE = ctx.saved_tensors
        dh_TER = torch.mul(dz_TER, w_TE.unsqueeze(-1), out=dz_TER.new_empty(dz_TER.shape))
        dw_TE = (dz_TER * h_TER).sum(-1, dtype=w_TE.dtype) if ctx.needs_input_grad[1] else None
        return dh_TER, dw_TE


def weigh(h_TER: Tensor, w_TE: Tensor) -> Tensor:
    """z_TER = h w, in the dtype of h."""
    if h_TER.dtype == w_TE.dtype or torch.compiler.is_compiling():
        return (h_TER * w_TE.unsqueeze(-1)).to(h_TER.dtype)
    if not torch.is_grad_enabled():
        return torch.mul(h_TER, w_TE.unsqueeze(-1), out=h_TER.new_empty(h_TER.shape))
    z_TER: Tensor = _Weighed.apply(h_TER, w_TE)
    return z_TER


class _Scaled(torch.autograd.Function):
    """A trained tensor times a number, in another dtype, as one operation; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.scale, ctx.dtype = scale, p.dtype
        return torch.mul(p, scale, out=torch.empty_like(p, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor, None, None]:
        return torch.mul(dp, ctx.scale, out=torch.empty_like(dp, dtype=ctx.dtype)), None, None


def scaled(p: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``p`` times ``scale`` in ``dtype``."""
    if scale == 1:
        return p.to(dtype)
    if p.dtype == dtype or torch.compiler.is_compiling():
        return (p * scale).to(dtype)
    out: Tensor = _Scaled.apply(p, scale, dtype)
    return out


def add_up(y_TO: Tensor, z_TQ: Tensor, B_QO: Tensor, scale: float, dropout: float, training: bool) -> Tensor:
    """y + s z B, accumulated in place into the frozen output; with output dropout y + drop(s z B)."""
    z_TQ, B_QO = z_TQ.to(y_TO.dtype), scaled(B_QO, scale, y_TO.dtype)
    if dropout > 0 and training:
        return y_TO + F.dropout(z_TQ @ B_QO, dropout)
    return y_TO.addmm(z_TQ, B_QO) if torch.compiler.is_compiling() else y_TO.addmm_(z_TQ, B_QO)
