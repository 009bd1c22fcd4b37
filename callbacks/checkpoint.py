"""Last and best checkpoint."""

from __future__ import annotations

import os
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl.callbacks.resume import validation_due
from talklora_pl.errors import UserError
from talklora_pl.internals.lightning import step_ends
from talklora_pl.ranks import over_ranks


class Checkpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, the newest state, and ``best.ckpt``, the best validation so far.

    The last is written every ``every_n_train_steps`` optimiser steps, when ``every_minutes`` have passed since it was
    written, after every validation and epoch, and at the last step of ``max_steps``: always at the end of an optimiser
    step, from which the run can go on exactly.

    Args:
        monitor: metric that decides what is best; a run that does not log it has no best.
        mode: ``min`` or ``max``.
        every_n_train_steps: 0 means by time, after validations and epochs, and at the last step.
        dirpath: folder; by default ``checkpoints`` in the run's log folder.
        every_minutes: about how much work may be lost; 0 for no limit.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: str = "min",
        every_n_train_steps: int = 0,
        dirpath: str | None = None,
        every_minutes: float = 10.0,
    ) -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
        self.every_n_steps = every_n_train_steps
        self.every_minutes = every_minutes
        self._last_step = 0
        self._due = False  # since a validation amid a step
        self._saved: tuple[float, int] | None = None  # when, and after which step, or where this fit began
        self._look_at = 0  # the step at which to look at the clock again

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                os.makedirs(str(self.dirpath), exist_ok=True)
            except OSError as e:
                raise UserError(f"checkpoint.dirpath: {self.dirpath} cannot be made: {e.strerror}.") from e

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved, self._look_at = (time.monotonic(), trainer.global_step), 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if not step_ends(trainer):
            return  # the gradients of a half-finished step are in no checkpoint
        super().on_train_batch_end(trainer, *args, **kwargs)
        step = trainer.global_step
        due = self._due or (self.every_n_steps > 0 and step % self.every_n_steps == 0) or self._time_is_up(trainer)
        # in on_train_epoch_end Lightning's counters are in a state from which it does not resume exactly
        epoch_over = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not validation_due(trainer)
        if due or epoch_over or step == trainer.max_steps:
            self._save_newest(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_logged(trainer):
            super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # amid an accumulation the step is finished first
            self._due = not step_ends(trainer)
            if not self._due:
                self._save_newest(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_logged(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def _is_logged(self, trainer: L.Trainer) -> bool:
        """Whether there is something to judge the best by; Lightning would stop the run."""
        return self.monitor in {*trainer.callback_metrics, "epoch", "step"}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, SystemExit) or trainer.state.fn != "fit" or self._saved is None:
            return
        if self._last_step:
            rank_zero_info(
                f"Kept: {self.last_model_path}, the state after step {self._last_step}. "
                "With --ckpt_path last the same command goes on from there."
            )
        else:
            rank_zero_info("Kept: nothing of this fit, no checkpoint was due yet (--checkpoint.every_minutes).")

    def _save_newest(self, trainer: L.Trainer) -> None:
        # at most once a step: the second of two micro-batches, or the end of an epoch, would add nothing
        if trainer.fast_dev_run or trainer.global_step == self._last_step:  # type: ignore[attr-defined]
            return
        self.last_model_path = os.path.join(str(self.dirpath), f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        trainer.save_checkpoint(self.last_model_path, weights_only=False)
        self._last_step, self._due = trainer.global_step, False
        self._saved, self._look_at = (time.monotonic(), trainer.global_step), 0

    def _time_is_up(self, trainer: L.Trainer) -> bool:
        """Whether ``every_minutes`` have passed since the newest state was written; all ranks get the same answer.

        The first rank's clock counts. Asking it is a collective, so it also says at which step to ask again: half-way
        to the moment, if steps stay as fast as they were.
        """
        step = trainer.global_step
        if self.every_minutes <= 0 or self._saved is None or step < self._look_at:
            return False
        at, before = self._saved
        passed = time.monotonic() - at
        left = 60 * self.every_minutes - passed
        steps = int(left / 2 * (step - before) / passed)
        found = [left <= 0, step + max(1, steps)] if trainer.is_global_zero else [0, 0]
        up, self._look_at = over_ranks(found, "sum")
        return bool(up)
