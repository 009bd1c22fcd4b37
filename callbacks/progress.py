"""Lightning's progress bar for windows of 80 columns, and where the number of epochs is open."""

from __future__ import annotations

import shutil
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.text import Text

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
    all else ends in a table or a file."""

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
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the last letters of the folder's name, which is said anyway
        return metrics
