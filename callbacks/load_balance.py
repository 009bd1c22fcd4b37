"""Which experts carry the load, logged while training."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch


class LoadBalance(L.Callback):
    """Logs how evenly the experts are used, from the routing of the newest micro-step, pads left out.

    Per layer with n experts and weight shares p: normalised entropy H(p) / log n (1 means even), largest share.

    Args:
        every_n_steps: optimiser steps between two records.
        detailed: also every layer's shares, not only the mean over layers.
    """

    def __init__(self, every_n_steps: int = 10, detailed: bool = False) -> None:
        self.every_n_steps = every_n_steps
        self.detailed = detailed

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps or trainer.fit_loop._should_accumulate():
            return
        entropy, largest = [], []
        for r in pl_module.routing:
            p_E = r.weight_share().detach()
            n = len(p_E)
            if n < 2:
                continue
            entropy.append(-torch.xlogy(p_E, p_E).sum() / math.log(n))
            largest.append(p_E.max())
            if self.detailed:
                for i, share in enumerate(p_E):
                    pl_module.log(f"load/{r.layer}/{i}", share, batch_size=1)
        if entropy:
            pl_module.log("load/entropy", torch.stack(entropy).mean(), batch_size=1)
            pl_module.log("load/largest_share", torch.stack(largest).mean(), batch_size=1)
