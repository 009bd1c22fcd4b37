"""Attention within the rows of a packed batch by PyTorch's own kernel for rows of unequal lengths.

It stands in for ``sdpa``, which would need a T x T mask for such a batch, and does what ``sdpa`` does for any other.

R rows, T tokens of all of them, H heads, K heads of keys and values, d width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from talklora_pl.internals.transformers import attention_of, rows_are_packed

NAME = "talklora_varlen"
"""The implementation's name in a model's configuration."""


@contextmanager
def packed(now: bool) -> Iterator[None]:
    """Inside, the batch is known to be packed or not: models need not look, and with this attention make no mask."""
    token = rows_are_packed.set(now)
    try:
        yield
    finally:
        rows_are_packed.reset(token)


def arguments(model: Any, borders: Tensor, longest: int) -> dict[str, Any]:
    """What a model is told of a packed batch beside its positions, by the names of transformers: nothing unless its
    attention has a kernel for it, because the rest make a mask from the positions.

    Args:
        borders: (R + 1,) int32, where the rows begin and the last one ends.
        longest: tokens of the longest row.
    """
    attention = attention_of(model.config) or ""
    if attention != NAME and "flash" not in attention:
        return {}
    ends = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    return ends | {"max_length_q": longest, "max_length_k": longest}


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of transformers' interface: (B,H,S,d), (B,K,S,d), (B,K,S,d) -> (B,S,H,d).

    Raises:
        ValueError: a packed batch, and something that the kernel has not.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    lacking = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if lacking or dropout > 0 or is_causal is False:
        raise ValueError(f"no variable-length kernel for {', '.join(lacking) or 'dropout, or attention both ways'}")
    q_THd, k_TKd, v_TKd = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    back = -1 if sliding_window is None else sliding_window - 1
    y_THd = kernel()(q_THd, k_TKd, v_TKd, cu_seq_lens_q, int(max_length_q), scaling, back)
    return y_THd.unsqueeze(0), None


def kernel() -> Callable[..., Tensor]:
    """Causal attention (T,H,d), (T,K,d), (T,K,d), borders (R + 1,), longest row, scale, tokens seen back (-1: all) ->
    (T,H,d).

    Raises:
        ImportError: this PyTorch has none.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = inspect.signature(varlen_attn).parameters

    def run(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float | None, back: int) -> Tensor:
        how: dict[str, Any] = {"window_size": (back, 0)}
        if (groups := q.shape[1] // k.shape[1]) > 1:
            if "enable_gqa" in options:  # torch 2.11 has it not
                how["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out: Any = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, **how)
        return out  # type: ignore[no-any-return] # it also gives other numbers where they are asked for

    return run


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if rows_are_packed.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)
