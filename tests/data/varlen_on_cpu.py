"""PyTorch's own operator for rows of unequal lengths, with a kernel for CPUs that is slow and right.

So its signature, its formula for gradients and what the compiler makes of it are those that a GPU meets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

longest: list[int] = []
"""What the operator was told, at every call."""


def _weights(q: Tensor, k: Tensor, borders: Tensor, scale: float, window: list[int]) -> Tensor:
    at = torch.arange(len(q))
    row = torch.bucketize(at, borders[1:].long(), right=True)
    back = at[:, None] - at
    seen = (row[:, None] == row) & (back >= 0) & ((back <= window[0]) if window[0] >= 0 else True)
    return (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, -torch.inf).softmax(-1)


def _whole(q: Tensor, *few: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in few]


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, _: Tensor, max_q: int, max_k: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, scale, window = options[:3]
    longest.append(max_q)
    assert borders.dtype == torch.int32 and max_q == max_k == borders.diff().max()
    assert q.shape[1] == k.shape[1] or options[3], "GQA was not asked for"
    k, v = _whole(q, k, v)
    y = torch.einsum("hij,jhd->ihd", _weights(q, k, borders, scale or q.shape[-1] ** -0.5, window), v)
    return y.contiguous(), q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, borders: Tensor, _: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, scale, window = options[:6]
    scale = scale or q.shape[-1] ** -0.5
    each_k, each_v = _whole(q, k, v)
    p = _weights(q, each_k, borders, scale, window)
    dp = torch.einsum("ihd,jhd->hij", dy, each_v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dk, dv = torch.einsum("hij,ihd->jhd", ds, q), torch.einsum("hij,ihd->jhd", p, dy)
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return torch.einsum("hij,jhd->ihd", ds, each_k).contiguous(), dk, dv
