"""Dropout of which only the mask is kept, a byte per number; compiled, a seed.

T tokens, D input width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    """Dropout that autograd differentiates."""
    if v_TD.device.type == "cpu" and torch.compiler.is_compiling():
        # for the backward pass again: left to itself the compiler keeps masks, and a CPU stores one in ten times the
        # time in which it makes one
        bits_1 = _compiled_bits(torch.empty(1, dtype=torch.int64))
        out_TD: Tensor = checkpoint(_drop_by, v_TD, bits_1, p, use_reentrant=False, preserve_rng_state=False)
        return out_TD
    return F.dropout(v_TD, p)


def _mask(shape: torch.Size, p: float) -> Tensor:
    """Where something is left, each with 1 - p: a CPU draws 64 bits in little more time than one, so they are shared.

    Near 0 and 1 of p, 16 bits would leave less than three digits of it right.
    """
    bits, kind = (16, torch.int16) if 0.01 < p < 0.99 else (32, torch.int32)
    words = _fill(torch.empty(*shape[:-1], -(-shape[-1] // (64 // bits)), dtype=torch.int64))
    mask_TD: Tensor = words.view(kind)[..., : shape[-1]] >= _below(p, bits)
    return mask_TD


def _drop_by(v_TD: Tensor, bits_1: Tensor, p: float) -> Tensor:
    """Dropout whose mask is a function of 64 random bits and of every number's place.

    A compiler fuses that with what it is for; its own random numbers it computes one by one on a CPU, which takes ten
    times as long (1,712 x 576 numbers).
    """
    seed_2, D = bits_1.view(torch.int32), v_TD.shape[-1]
    row, column = (torch.arange(n, dtype=torch.int32) for n in (v_TD.numel() // D, D))
    # the seed before rows and columns meet: what no seed is in would be the same for all masks, and kept
    place = ((row * D + seed_2[0]).unsqueeze(1) + column).view(v_TD.shape)
    kept_TD = _stirred(_stirred(place) + seed_2[1]) >= _below(p, 32)
    return v_TD.where(kept_TD, 0) * (1 / (1 - p))


def _stirred(h: Tensor) -> Tensor:
    """32 bits, each of which depends on all that were there, one to one: MurmurHash3's last step."""
    for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB), (16, 1)):
        h = (h ^ ((h >> shift) & (2 ** (32 - shift) - 1))) * factor  # zeros come in from the left, not the sign
    return h


def _below(p: float, bits: int) -> int:
    """The number that a share p of all signed ones with so many bits is below."""
    return round(p * (1 << bits)) - (1 << (bits - 1))


def _fill(words: Tensor) -> Tensor:
    """The same memory, of random bits."""
    return words.random_(torch.iinfo(torch.int64).min, None)


def _bits(like: Tensor) -> Tensor:
    return _fill(torch.empty_like(like))


# an operator, since the compiler would compute its own random numbers anew for each number that depends on them; by its
# tag whoever computes a pass again knows that the same bits are to be drawn, and by its argument on which device
_compiled_bits = torch.library.custom_op(
    "talklora_pl::random_bits", _bits, mutates_args=(), tags=[torch.Tag.nondeterministic_seeded]
)
_compiled_bits.register_fake(torch.empty_like)
