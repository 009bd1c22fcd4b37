"""Last and best checkpoint."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl.callbacks.resume import validation_due
from talklora_pl.errors import UserError
from talklora_pl.internals.lightning import step_ends


class Checkpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, the newest state, and ``best.ckpt``, the best validation so far.

    The last is written every ``every_n_train_steps`` optimiser steps, after every validation and epoch, and at the last
    step of ``max_steps``, always at a position from which the run can go on exactly.

    Args:
        monitor: metric that decides what is best; a run that does not log it has no best.
        mode: ``min`` or ``max``.
        every_n_train_steps: 0 means after validations, epochs and the last step only.
        dirpath: folder; by default ``checkpoints`` in the run's log folder.
    """

    def __init__(
        self, monitor: str = "val_loss", mode: str = "min", every_n_train_steps: int = 0, dirpath: str | None = None
    ) -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
        self.every_n_steps = every_n_train_steps
        self._last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                os.makedirs(str(self.dirpath), exist_ok=True)
            except OSError as e:
                raise UserError(f"checkpoint.dirpath: {self.dirpath} cannot be made: {e.strerror}.") from e

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if not step_ends(trainer):
            return  # the gradients of a half-finished step are in no checkpoint
        super().on_train_batch_end(trainer, *args, **kwargs)
        step = trainer.global_step
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0
        # in on_train_epoch_end Lightning's counters are in a state from which it does not resume exactly
        epoch_over = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not validation_due(trainer)
        if due or epoch_over or step == trainer.max_steps:
            self._save_newest(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_logged(trainer):
            super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_newest(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_logged(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def _is_logged(self, trainer: L.Trainer) -> bool:
        """Whether there is something to judge the best by; Lightning would stop the run."""
        return self.monitor in {*trainer.callback_metrics, "epoch", "step"}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and self.last_model_path:
            rank_zero_info(f"Kept: {self.last_model_path}. With --ckpt_path last the same command goes on from there.")

    def _save_newest(self, trainer: L.Trainer) -> None:
        # at most once a step: the second of two micro-batches, or the end of an epoch, would add nothing
        if trainer.fast_dev_run or trainer.global_step == self._last_step:  # type: ignore[attr-defined]
            return
        self._last_step = trainer.global_step
        self.last_model_path = os.path.join(str(self.dirpath), f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        trainer.save_checkpoint(self.last_model_path, weights_only=False)
