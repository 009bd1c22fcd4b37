"""The two pieces of arithmetic that keep an adapted Linear as cheap as the frozen one.

T tokens, D input width, O output width, P rows of the down projection (usually experts x rank).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from talklora_pl.sites.dropped import drop, dropped, plain_drop


class _FrozenDown(torch.autograd.Function):
    """(x Wᵀ + b, drop(x) Aᵀ) as one node, so that dx is made in one pass: dx = dy W, then dx += dh A in place.

    The last ``whole`` rows of A are multiplied with x as it is. Of dropout only the mask is kept, a byte per number: x
    itself is kept once for all Linears that it goes into.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, dropout: float, W_OD: Tensor, b_O: Tensor | None, A_PD: Tensor, whole: int
    ) -> tuple[Tensor, Tensor]:
        ctx.dropout, ctx.whole = dropout, whole
        drop_TD, mask_TD = drop(x_TD, dropout) if dropout else (x_TD, None)
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[4] else None, mask_TD, W_OD, A_PD)
        return F.linear(x_TD, W_OD, b_O), _down(x_TD, drop_TD, A_PD, whole)

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
                _add_dx(dx_TD, dh_TP, A_PD, mask_TD, ctx.dropout, ctx.whole)
        if ctx.needs_input_grad[4]:
            dA_PD = _dA(dh_TP, x_TD, mask_TD, ctx.dropout, ctx.whole)
        return dx_TD, None, None, None, dA_PD, None


class _DroppedDown(torch.autograd.Function):
    """drop(x) Aᵀ that keeps x and the mask, as :class:`_FrozenDown`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, dropout: float, A_PD: Tensor, whole: int) -> Tensor:
        ctx.dropout, ctx.whole = dropout, whole
        drop_TD, mask_TD = drop(x_TD, dropout) if dropout else (x_TD, None)
        ctx.save_for_backward(x_TD, mask_TD, A_PD)
        return _down(x_TD, drop_TD, A_PD, whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TP: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, mask_TD, A_PD = ctx.saved_tensors
        dx_TD = None
        if ctx.needs_input_grad[0]:
            dx_TD = _add_dx(None, dh_TP, A_PD, mask_TD, ctx.dropout, ctx.whole)
        return dx_TD, None, _dA(dh_TP, x_TD, mask_TD, ctx.dropout, ctx.whole), None


def _down(x_TD: Tensor, drop_TD: Tensor, A_PD: Tensor, whole: int) -> Tensor:
    """drop(x) times the first rows of A, x times the last ``whole``."""
    if whole == 0:
        return F.linear(drop_TD, A_PD)
    return torch.cat([F.linear(drop_TD, A_PD[:-whole]), F.linear(x_TD, A_PD[-whole:])], dim=1)


def _add_dx(dx_TD: Tensor | None, dh_TP: Tensor, A_PD: Tensor, mask_TD: Tensor, dropout: float, whole: int) -> Tensor:
    """The gradient of x from :func:`_down`, added in place to ``dx_TD``."""
    rest = dh_TP.shape[1] - whole
    dr_TD, scale = dh_TP[:, :rest] @ A_PD[:rest], 1 / (1 - dropout)
    dx_TD = dropped(dr_TD, mask_TD, scale) if dx_TD is None else dx_TD.add_(dropped(dr_TD, mask_TD, 1), alpha=scale)
    return dx_TD.addmm_(dh_TP[:, rest:], A_PD[rest:]) if whole else dx_TD


def _dA(dh_TP: Tensor, x_TD: Tensor, mask_TD: Tensor | None, dropout: float, whole: int) -> Tensor:
    """The gradient of A from :func:`_down`."""
    drop_TD = x_TD if mask_TD is None else dropped(x_TD, mask_TD, 1 / (1 - dropout))
    if whole == 0:
        return dh_TP.t() @ drop_TD
    dA_PD = x_TD.new_empty(dh_TP.shape[1], x_TD.shape[1])
    torch.mm(dh_TP[:, :-whole].t(), drop_TD, out=dA_PD[:-whole])
    torch.mm(dh_TP[:, -whole:].t(), x_TD, out=dA_PD[-whole:])
    return dA_PD


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of a product in ``dtype`` are looked at."""
    return dtype if dtype.itemsize >= 4 else torch.float32


_NOTHING = nullcontext()


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """No autocast inside of it; entering the context for that alone would take as long as a product of few tokens."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


FEW = 16
"""Tokens on a CPU for which a product with a rank-space matrix in half precision takes longer to prepare than to do."""


def product_dtype(x_TD: Tensor) -> torch.dtype:
    """The dtype of the products with rank-space matrices: that of x, but float32 for few tokens without gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # whose code must not depend on how many there are
        return x_TD.dtype
    few = x_TD.device.type == "cpu" and x_TD.dtype.itemsize < 4 and x_TD.shape[0] <= FEW
    return torch.float32 if few and not torch.is_autocast_enabled("cpu") else x_TD.dtype


def used_dtype(x_TD: Tensor) -> torch.dtype:
    """:func:`product_dtype`, or what autocast makes of it."""
    kind = x_TD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else product_dtype(x_TD)


def plain_weight(layer: Any, dtype: torch.dtype) -> Tensor | None:
    """W_OD of a layer that is nothing but ``x Wᵀ + b`` with a frozen weight in ``dtype`` and no autocast, else None.

    Quantised layers, layers whose forward was replaced and layers that are being trained take the ordinary path.
    """
    if "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    own = layer.frozen_class  # a subclass of Linear may compute something else
    if own not in (nn.Linear, Conv1D):
        return None
    weight, bias = layer.weight, layer.bias
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != dtype:
        return None
    if torch.is_autocast_enabled(weight.device.type):
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    W_OD: Tensor = weight.t() if own is Conv1D else weight
    return W_OD


def frozen_and_down(
    frozen: Any, layer: Any, x_TD: Tensor, dropout: float, A_PD: Tensor, whole: int = 0
) -> tuple[Tensor, Tensor]:
    """Frozen output y_TO and rank features h_TP of one layer; y may be written to in place.

    Args:
        frozen: the layer's own forward, for the ordinary path.
        layer: the frozen layer, see :class:`~talklora_pl.adapter.host.Adapted`.
        x_TD: its input.
        dropout: share of the adapter's input that is dropped; 0 while evaluating.
        A_PD: all down projections, stacked.
        whole: how many of the last rows multiply x without dropout.
    """
    whole = whole if dropout > 0 else 0
    dtype = product_dtype(x_TD)
    if dtype != x_TD.dtype and dropout == 0:
        W_OD = plain_weight(layer, x_TD.dtype)
        y_TO = frozen(x_TD).clone() if W_OD is None else F.linear(x_TD, W_OD, layer.bias)
        return y_TO, F.linear(x_TD.to(dtype), A_PD.to(dtype))
    if torch.compiler.is_compiling():  # the compiler fuses plain code
        source_TD = plain_drop(x_TD, dropout) if dropout > 0 else x_TD
        return frozen(x_TD), _down(x_TD, source_TD, A_PD.to(source_TD.dtype), whole)
    kind = x_TD.device.type
    autocast = torch.is_autocast_enabled(kind)
    W_OD = plain_weight(layer, x_TD.dtype)
    if W_OD is not None:
        if not torch.is_grad_enabled() and dropout == 0:
            return F.linear(x_TD, W_OD, layer.bias), F.linear(x_TD, A_PD.to(x_TD.dtype))
        y_TO, h_TP = _FrozenDown.apply(x_TD, dropout, W_OD, layer.bias, A_PD.to(x_TD.dtype), whole)
        return y_TO, h_TP
    # such a layer may return a view or keep its output for its own backward: only a copy is ours to write to
    y_TO = frozen(x_TD).clone()
    dtype = torch.get_autocast_dtype(kind) if autocast else x_TD.dtype
    if dropout == 0:
        return y_TO, F.linear(x_TD, A_PD.to(x_TD.dtype))
    with torch.autocast(kind, enabled=False):
        return y_TO, _DroppedDown.apply(x_TD.to(dtype), dropout, A_PD.to(dtype), whole)


class Fork:
    """Where a weighing leaves its weights for the fork above it, see :func:`fork`."""

    w_TE: Tensor | None = None


class _Forked(torch.autograd.Function):
    """h as it is, for weighing only, and in another dtype: the two gradients are added as they are weighed and cast."""

    @staticmethod
    def forward(ctx: Any, h_TER: Tensor, dtype: torch.dtype, below: Fork) -> tuple[Tensor, Tensor]:
        ctx.below, ctx.dtype = below, h_TER.dtype
        ctx.set_materialize_grads(False)
        return h_TER.view_as(h_TER), h_TER.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_TER: Tensor | None, dm_TER: Tensor | None) -> tuple[Tensor | None, None, None]:
        if dz_TER is None:
            return None if dm_TER is None else dm_TER.to(ctx.dtype), None, None
        w_TE, ctx.below.w_TE = ctx.below.w_TE, None
        w_TE1, out_TER = w_TE.unsqueeze(-1), dz_TER.new_empty(dz_TER.shape)
        if dm_TER is None:
            return torch.mul(dz_TER, w_TE1, out=out_TER), None, None
        return torch.addcmul(dm_TER, dz_TER, w_TE1, out=out_TER), None, None


def fork(h_TER: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Fork | None]:
    """h for :func:`weigh`, with the last of the three, and for nothing else; h in ``dtype``, for deciding."""
    if h_TER.dtype == dtype or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return h_TER, h_TER.to(dtype), None
    below = Fork()
    return *_Forked.apply(h_TER, dtype, below), below


class _Weighed(torch.autograd.Function):
    """h w in the dtype of h, without a copy of h in that of w."""

    @staticmethod
    def forward(ctx: Any, h_TER: Tensor, w_TE: Tensor, fork: Fork | None) -> Tensor:
        ctx.save_for_backward(h_TER, w_TE)
        ctx.fork = fork
        return torch.mul(h_TER, w_TE.unsqueeze(-1), out=h_TER.new_empty(h_TER.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_TER: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h_TER, w_TE = ctx.saved_tensors
        dw_TE = (dz_TER * h_TER).sum(-1, dtype=w_TE.dtype) if ctx.needs_input_grad[1] else None
        if ctx.fork is not None:
            ctx.fork.w_TE = w_TE
            return dz_TER, dw_TE, None
        return torch.mul(dz_TER, w_TE.unsqueeze(-1), out=dz_TER.new_empty(dz_TER.shape)), dw_TE, None


def weigh(h_TER: Tensor, w_TE: Tensor, fork: Fork | None = None) -> Tensor:
    """z_TER = h w, in the dtype of h."""
    if fork is None and (h_TER.dtype == w_TE.dtype or torch.compiler.is_compiling()):
        return (h_TER * w_TE.unsqueeze(-1)).to(h_TER.dtype)
    if not torch.is_grad_enabled():
        return torch.mul(h_TER, w_TE.unsqueeze(-1), out=h_TER.new_empty(h_TER.shape))
    z_TER: Tensor = _Weighed.apply(h_TER, w_TE, fork)
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
    dtype = product_dtype(y_TO)
    z_TQ, B_QO = z_TQ.to(dtype), scaled(B_QO, scale, dtype)
    if dropout > 0 and training:
        return y_TO + plain_drop(z_TQ @ B_QO, dropout).to(y_TO.dtype)
    if dtype != y_TO.dtype:
        return y_TO.add_(z_TQ @ B_QO)
    return y_TO.addmm(z_TQ, B_QO) if torch.compiler.is_compiling() else y_TO.addmm_(z_TQ, B_QO)
