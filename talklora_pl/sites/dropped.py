"""Dropout of which only the mask is kept, a byte per number.

T tokens, D input width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def drop(x_TD: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """What dropout leaves of x, and where it leaves something.

    Args:
        x_TD: any tensor.
        p: share that becomes zero; the rest is divided by 1 - p.
    """
    if x_TD.device.type != "cpu":
        return torch.native_dropout(x_TD, p, True)
    mask_TD = _mask(x_TD.shape, p)
    return dropped(x_TD, mask_TD, 1 / (1 - p)), mask_TD


def dropped(v_TD: Tensor, mask_TD: Tensor, scale: float) -> Tensor:
    """The same again, also of a gradient: v times the mask times ``scale``."""
    if v_TD.device.type != "cpu":
        out_TD: Tensor = torch.ops.aten.native_dropout_backward(v_TD, mask_TD, scale)
        return out_TD
    # as integers: a CPU multiplies floats and booleans five times more slowly, and NaN times zero is zero
    kept_TD = (v_TD.view(_INTEGERS[v_TD.dtype.itemsize]) * mask_TD).view(v_TD.dtype)
    return kept_TD if scale == 1 else kept_TD.mul_(scale)


def plain_drop(v_TD: Tensor, p: float) -> Tensor:
    """Dropout that autograd differentiates.

    Compiled for a CPU it has the masks of :func:`drop`, as operators: the compiler's own random numbers are computed
    there one by one, which takes four times as long (1,712 x 576 numbers: 21 ms, not 5).
    """
    if v_TD.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.dropout(v_TD, p)
    return v_TD.where(_mask(v_TD.shape, p), 0) * (1 / (1 - p))


def _mask(shape: torch.Size, p: float) -> Tensor:
    """Where something is left, each with 1 - p: a CPU draws 64 bits in little more time than one, so they are shared.

    Near 0 and 1 of p, 16 bits would leave less than three digits of it right.
    """
    bits, kind = (16, torch.int16) if 0.01 < p < 0.99 else (32, torch.int32)
    words = torch.empty(*shape[:-1], -(-shape[-1] // (64 // bits)), dtype=torch.int64)
    fill = _fill_compiled if torch.compiler.is_compiling() else _fill
    fill(words)
    mask_TD: Tensor = words.view(kind)[..., : shape[-1]] >= round(p * 2**bits) - 2 ** (bits - 1)
    return mask_TD


def _fill(words: Tensor) -> None:
    """Random bits."""
    words.random_(torch.iinfo(torch.int64).min, None)


# the compiler cannot trace random_, and takes an operator as it is; outside of it this would import the compiler
_fill_compiled = torch.library.custom_op(
    "talklora_pl::fill_with_bits", _fill, mutates_args=["words"], tags=[torch.Tag.nondeterministic_seeded]
)
_fill_compiled.register_fake(lambda words: None)
