"""What the model writes, at every validation."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from talklora_pl.adapter_module import AdapterModule
from talklora_pl.monitoring.tensorboard import Board


class SampleOutputs(L.Callback):
    """Lets the model answer the same prompts at every validation and writes them into the log, as text ``samples``.

    It costs that many generated answers at each validation. A classifier writes nothing.

    Args:
        count: so many of the first validation questions, beside their right answers; 0: none.
        prompts: texts to go on from, as the model reads them.
        max_new_tokens: of an answer.
    """

    def __init__(self, count: int = 0, prompts: list[str] | None = None, max_new_tokens: int = 32) -> None:
        if count < 0 or max_new_tokens < 1:
            raise ValueError(f"count must be at least 0 and max_new_tokens at least 1, got {count}, {max_new_tokens}")
        self.count = count
        self.prompts = prompts or []
        self.max_new_tokens = max_new_tokens
        self._asked: list[Tensor] = []
        self._right: list[str | None] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        if not (self.count or self.prompts):
            return
        if pl_module.base.head.classifies:
            rank_zero_info("samples: a classifier writes no answers, so none are shown.")
        elif not Board(trainer).takes_text:
            rank_zero_info("samples: no logger of this run takes text, so no answers are shown.")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: AdapterModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or not self._shows(trainer, pl_module):
            return
        ids = [pl_module.tokenizer(text)["input_ids"] for text in self.prompts]
        self._asked = [torch.tensor(i, device=pl_module.device) for i in ids]
        self._right = [None] * len(ids)
        groups = batch["group"].tolist() if "group" in batch else list(range(len(batch["input_ids"])))
        for q, (length, answer) in enumerate(zip(batch["prompt_length"].tolist(), batch["answer"].tolist())):
            if q < self.count and length and batch["real"][q]:
                self._asked.append(batch["input_ids"][groups.index(q), :length])
                self._right.append(batch["answers"][q][answer] if answer >= 0 else None)
        if not self._asked and pl_module.device_mesh is not None:
            # of few questions this rank has none, but the others need its part of the model to answer theirs
            self._asked = [batch["input_ids"][0, :1]]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        if not self._asked:
            return
        asked, self._asked = self._asked, []
        answers = pl_module.generation(self.max_new_tokens)(asked)
        shown = []
        for ids, (answer, _), right in zip(asked, answers, self._right):
            prompt = pl_module.tokenizer.decode(ids, skip_special_tokens=False)
            shown.append({"prompt": prompt, "answer": answer} | ({"right": right} if right is not None else {}))
        Board(trainer).samples(shown)

    def _shows(self, trainer: L.Trainer, pl_module: AdapterModule) -> bool:
        if not (self.count or self.prompts) or trainer.sanity_checking or pl_module.base.head.classifies:
            return False
        if pl_module.device_mesh is not None:  # the ranks that share the model compute together
            return True
        return trainer.is_global_zero and Board(trainer).takes_text
