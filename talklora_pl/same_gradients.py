"""A faster way to a step's gradients is trusted when it has given those of the plain way once, in the run itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Gradients = Callable[[], Sequence[Tensor | None]]

FLOOR = 1e-3  # of the largest gradient: smaller tensors are compared with that


def difference(trained: Sequence[nn.Parameter], plain: Gradients, fast: Gradients, dtype: torch.dtype) -> str:
    """Where two ways to the gradients of one batch differ by more than rounding and random numbers do.

    The faster way may draw its random numbers otherwise: gradients may differ as far as those of two seeds do. The
    trained tensors are moved from their values for the time being, because behind a tensor of zeros every gradient is
    zero. They and the random numbers go on as if nothing had been computed, also behind an error of either way.

    Args:
        trained: what is differentiated by.
        plain, fast: the gradients by these, None where there is none.
        dtype: of the base.

    Returns:
        what is wrong, or an empty string.
    """

    def gradients(of: Gradients, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(trained, of(), strict=True)]

    before = [p.detach().clone() for p in trained]
    try:
        with torch.random.fork_rng([p.device for p in trained if p.is_cuda][:1]):
            torch.manual_seed(0)
            with torch.no_grad():
                for p in trained:
                    p.add_(torch.randn_like(p), alpha=0.02)
            torch.clear_autocast_cache()  # which knows tensors, and not whether they were written to
            want, other = (gradients(plain, seed) for seed in (1, 2))
            got = gradients(fast, 1)
    finally:
        with torch.no_grad():
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)
        torch.clear_autocast_cache()
    # in half precision rounding alone moves gradients of single small tensors by a seventh (30 layers, bfloat16):
    # those of compiled layers are then as near to float32's as those of layers as they are
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(dtype, 0.5)
    size = max(float(g.norm()) for g in want)
    for w, o, g in zip(want, other, got, strict=True):
        allowed = tolerance * max(float(w.norm()), FLOOR * size) + 3 * float((w - o).norm())
        if not float((g - w).norm()) <= allowed:
            return (
                f"the gradient of a trained tensor of shape {list(w.shape)} is {float((g - w).norm()):.1e} away from "
                f"that of the plain computation, whose norm is {float(w.norm()):.1e}"
            )
    return ""
