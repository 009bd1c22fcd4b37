"""An error of memory says what took it, and which settings take less."""

from __future__ import annotations

from typing import Any

import lightning as L

from talklora_pl.memory.report import note_out_of_memory


class OutOfMemory(L.Callback):
    """Adds a note to the error, which a traceback shows beneath it; :class:`FineTuner` brings it along."""

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        note_out_of_memory(pl_module, getattr(trainer, "datamodule", None), exception)
