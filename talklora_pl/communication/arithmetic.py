"""Small functions that several communication modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Norm = Literal["none", "layer", "rms"]
Activation = Literal["silu", "gelu", "relu", "tanh"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": F.tanh}


class _RMSNorm(torch.autograd.Function):
    """m r with r = 1 / sqrt(mean m² + eps) over the last dimension: dm = r (dn - n mean(n dn))."""

    @staticmethod
    def forward(ctx: Any, m_TEF: Tensor) -> Tensor:
        r_TE1 = m_TEF.square().mean(-1, keepdim=True).add_(torch.finfo(m_TEF.dtype).eps).rsqrt_()
        n_TEF = m_TEF * r_TE1
        ctx.save_for_backward(n_TEF, r_TE1)
        return n_TEF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dn_TEF: Tensor) -> Tensor:
        n_TEF, r_TE1 = ctx.saved_tensors
        c_TE1 = (n_TEF * dn_TEF).mean(-1, keepdim=True)
        return torch.addcmul(dn_TEF, n_TEF, c_TE1, value=-1).mul_(r_TE1)


def normalise(m_TEF: Tensor, norm: Norm) -> Tensor:
    """Normalised over the features of every expert, without trained scale."""
    if norm == "layer":
        return F.layer_norm(m_TEF, m_TEF.shape[-1:])
    if norm == "none":
        return m_TEF
    if m_TEF.is_cuda or torch.compiler.is_compiling():  # one kernel there, sixteen small operations on a CPU
        return F.rms_norm(m_TEF, m_TEF.shape[-1:])
    n_TEF: Tensor = _RMSNorm.apply(m_TEF)
    return n_TEF
