"""What all processes know together. None of it waits for a device, as Lightning's ``reduce`` does in its barrier."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

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
    if not _several():
        return [t.to(dtype) for t in tensors]
    flat: Tensor = _SumOverRanks.apply(torch.cat([t.reshape(-1).to(dtype) for t in tensors]))
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """A tensor of each process, all of one shape: what torchmetrics calls ``dist_sync_fn``.

    Its own first compares the shapes, for which the host waits, behind a barrier, where it waits as well.
    """
    tensor = tensor.contiguous()
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, tensor, group)
    return found


def every_rank(value: Any) -> list[Any]:
    """What the host of each process has; every process must call it."""
    if not _several():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=_hosts(dist.group.WORLD))
    return found


def over_ranks(numbers: Sequence[int], how: Literal["sum", "max"]) -> list[int]:
    """Sums, or maxima, over all processes of whole numbers that the hosts have; every process must call it."""
    if not _several():
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.int64)
    operation = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
    dist.all_reduce(found, operation, group=_hosts(dist.group.WORLD))
    return found.tolist()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@functools.lru_cache(maxsize=1)
def _hosts(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The processes of `world`, joined by gloo, which waits for no device; made by the first call for each `world`."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
