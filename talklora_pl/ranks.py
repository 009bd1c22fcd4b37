"""Sums over all processes, for statistics that span them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * dist.get_world_size()


def sum_over_ranks(*tensors: Tensor) -> list[Tensor]:
    """The sums of small tensors over all processes, with one collective, in float64 if any is, else in float32.

    The gradient is right after the mean over processes that DDP takes: with S = sum_r S_r and a loss L(S) that every
    process computes, dL/dθ = sum_r L'(S) dS_r/dθ = mean_r( world L'(S) dS_r/dθ ). So the backward multiplies with the
    number of processes and stays local. Do not nest: L(S(S')) of one sum in another is not covered.
    """
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [t.to(dtype) for t in tensors]
    flat: Tensor = _SumOverRanks.apply(torch.cat([t.reshape(-1).to(dtype) for t in tensors]))
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
