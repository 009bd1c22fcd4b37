"""Learning-rate schedules: warm-up, then linear or cosine decay to zero."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupLinear(LambdaLR):
    """Factor s/warmup up to step ``warmup_steps``, then linearly to 0 at ``total_steps``.

    Args:
        warmup_steps: optimiser steps; a value below 1 is a share of total_steps.
        total_steps: optimiser steps; None means those of the whole fit (FineTuner fills it in).
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 0, total_steps: int | None = None) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        total = self.total_steps or math.inf
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * (self.total_steps or 0)
        if step < warmup:
            return step / warmup
        if math.isinf(total):
            return 1.0
        return self.decay(min(1.0, (step - warmup) / max(1.0, total - warmup)))

    def decay(self, progress: float) -> float:
        """Factor after warm-up for a progress in [0, 1]."""
        return 1 - progress


class WarmupCosine(WarmupLinear):
    """Like :class:`WarmupLinear` with half a cosine, (1 + cos(pi p)) / 2, in place of the line."""

    def decay(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2
