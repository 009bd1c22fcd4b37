"""Does communication smooth the routing? Measured in every evaluation."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from talklora_pl.adapter_module import AdapterModule
from talklora_pl.monitoring.sensitivity import DecisionInputs, Sensitivity
from talklora_pl.monitoring.tensorboard import Board


class RoutingSensitivity(L.Callback):
    """Logs how strongly routing weights react to the layers' inputs.

    Equations: :mod:`talklora_pl.monitoring.sensitivity`.

    ``sensitivity/change`` and ``sensitivity/jacobian`` are means over layers; ``sensitivity_layers/*`` is every layer.
    The tokens are those of the first validation batches of every process, the same in every evaluation.

    Args:
        batches: how many of them.
        tokens: how many tokens of each.
        eps: relative size of the perturbation.
        directions: random directions per token.
    """

    def __init__(self, batches: int = 1, tokens: int = 32, eps: float = 1e-2, directions: int = 4) -> None:
        self.batches = batches
        self.tokens = tokens
        self.eps = eps
        self.directions = directions
        self._sensitivity: Sensitivity | None = None
        self._inputs: DecisionInputs | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        layers = pl_module.adapter.routed_layers()
        measure = layers and not trainer.sanity_checking
        self._sensitivity = Sensitivity(layers, self.eps, self.directions).to(pl_module.device) if measure else None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: AdapterModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._sensitivity is not None and batch_idx < self.batches and dataloader_idx == 0:
            self._inputs = DecisionInputs(pl_module.adapter, batch["attention_mask"], self.tokens).__enter__()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: AdapterModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._inputs is not None and self._sensitivity is not None:
            self._inputs.__exit__()
            self._sensitivity.update(self._inputs)
            self._inputs = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        if self._sensitivity is None:
            return
        board = Board(trainer)
        for key, value_L in self._sensitivity.compute().items():
            values = dict(zip(self._sensitivity.rows, value_L.tolist(), strict=True))
            pl_module.log(f"sensitivity/{key}", torch.nanmean(value_L), batch_size=1)
            board.scalars({f"sensitivity_layers/{key}/{name}": v for name, v in values.items() if v == v})
        self._sensitivity = None

    def on_exception(self, trainer: L.Trainer, pl_module: AdapterModule, exception: BaseException) -> None:
        if self._inputs is not None:
            self._inputs.__exit__()
            self._inputs = None
