"""Last and best checkpoint."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class Checkpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` and the best by ``monitor``; in a run without validation, the newest.

    Args:
        monitor: metric that decides what is best.
        mode: ``min`` or ``max``.
        every_n_train_steps: save every so many optimiser steps; by default after every validation.
        dirpath: folder; by default ``checkpoints`` in the run's log folder.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: str = "min",
        every_n_train_steps: int | None = None,
        dirpath: str | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> Any:
        if self.monitor not in monitor_candidates:
            return self._save_none_monitor_checkpoint(trainer, monitor_candidates)
        return super()._save_topk_checkpoint(trainer, monitor_candidates)
