"""Lightning's progress bar for windows of 80 columns, and where the number of epochs is open."""

from __future__ import annotations

import shutil
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.text import Text

from talklora_pl.monitoring.host import waits

NARROW = 110
"""So many columns take the whole bar, its speed and two metrics on one line."""


class _Description(TextColumn):
    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.plain = text.plain.replace("/-2", "")
        return text


class EpochProgress(RichProgressBar):
    """Without the number of the last epoch in a run that only steps or time limit; Lightning shows it as -2. A narrow
    window gets a shorter bar without its speed, so that the metrics stay on its line. Only a fit leaves its last bar:
    all else ends in a table or a file. It asks no device that computes beside the host, which would have to wait: it
    shows the loss that was last read back for the loggers."""

    asks_by_itself = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss: dict[str, Any] = {}

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        _, bar, batches, time, *speed = super().configure_columns(trainer)
        if shutil.get_terminal_size().columns < NARROW and isinstance(bar, BarColumn):
            bar.bar_width, speed = 10, []
        return [_Description("[progress.description]{task.description}"), bar, batches, time, *speed]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" and self.progress is not None:
            self.progress.live.transient = True
        super().teardown(trainer, pl_module, stage)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._look_at_loss(trainer)  # the last step's, which may have been read back since the bar looked
        super().on_train_batch_start(trainer, *args, **kwargs)

    def _look_at_loss(self, trainer: L.Trainer) -> None:
        loss = trainer.callback_metrics.get("train_loss")
        if loss is not None and not waits(loss):
            self._loss = {"train_loss": loss.item()}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        if trainer.training:
            self._look_at_loss(trainer)
        shown = self._loss | super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)  # the last letters of the folder's name, which is said anyway
        return shown
