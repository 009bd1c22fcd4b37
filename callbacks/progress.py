"""Lightning's progress bar where the number of epochs is open."""

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import ProgressColumn, Task, TextColumn
from rich.text import Text


class _Description(TextColumn):
    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.plain = text.plain.replace("/-2", "")
        return text


class EpochProgress(RichProgressBar):
    """Without the number of the last epoch in a run that only steps or time limit; Lightning shows it as -2."""

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        _, *others = super().configure_columns(trainer)
        return [_Description("[progress.description]{task.description}"), *others]
