"""Lightning's progress bar for windows of 80 columns, and where the number of epochs is open."""

from __future__ import annotations

import shutil
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.text import Text

from talklora_pl.callbacks.run_metrics import logs

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
    all else ends in a table or a file. A device that computes beside the host is asked for the loss at the steps that
    are logged, not at each: the host would wait for every one."""

    asks_by_itself = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        _, bar, batches, time, *speed = super().configure_columns(trainer)
        if shutil.get_terminal_size().columns < NARROW and isinstance(bar, BarColumn):
            bar.bar_width, speed = 10, []
        return [_Description("[progress.description]{task.description}"), bar, batches, time, *speed]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" and self.progress is not None:
            self.progress.live.transient = True
        super().teardown(trainer, pl_module, stage)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        if trainer.training:
            if waits(pl_module.device) and not logs(trainer, trainer.global_step - 1):
                return self._shown
            self._loss = {name: v.item() for name, v in trainer.callback_metrics.items() if name == "train_loss"}
        self._shown = self._loss | super().get_metrics(trainer, pl_module)
        self._shown.pop("v_num", None)  # the last letters of the folder's name, which is said anyway
        return self._shown


def waits(device: torch.device) -> bool:
    """Whether a number of this device is there only after a wait."""
    return device.type != "cpu"
