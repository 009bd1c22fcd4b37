"""Notice a loss or gradient that is no number before it reaches the weights."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from talklora_pl.callbacks.preemption import directory
from talklora_pl.errors import UserError
from talklora_pl.internals.lightning import step_ends
from talklora_pl.monitoring.tensorboard import Board


class FiniteGuard(L.Callback):
    """Leave out an optimiser step whose loss or gradient is NaN or infinite on any rank.

    Up to `skip` such steps are left out with a warning; at the next one the run saves ``nonfinite.ckpt`` (the state
    without that step) and stops with the ids of the examples. Buffers that the step's forward passes changed (expert
    counts) are put back too. Costs one all-reduce of a number per optimiser step.

    Args:
        skip: how many steps may be left out in the whole run.
        id_key: entry of a batch that names its examples.
    """

    def __init__(self, skip: int = 0, id_key: str = "id") -> None:
        self.skip, self.id_key = skip, id_key
        self.skipped = 0
        self._stop: str | None = None
        self._window: list[tuple[Any, torch.Tensor]] = []  # (ids, is the loss finite) of each micro-batch of the step
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._window:
            # those of the frozen base never change
            self._buffers = [(b, b.clone()) for adapter in _adapters(pl_module) for b in adapter.buffers()]
        ids = batch.get(self.id_key, "unknown") if isinstance(batch, dict) else "unknown"
        self._window.append((ids, torch.tensor(True)))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        ids, _ = self._window[-1]
        self._window[-1] = (ids, torch.isfinite(loss.detach()).all())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        losses = torch.stack([finite.to(trainer.strategy.root_device) for _, finite in self._window]).all()
        norms = torch._foreach_norm([p.grad for p in parameters])
        # with float16 the loss scaler finds infinite gradients itself, and expects some
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        gradients = torch.stack([torch.isfinite(n) for n in norms]).all() if norms and scaler is None else losses
        bad = trainer.strategy.reduce((~(losses & gradients)).to(torch.int32), reduce_op="max")
        if not int(bad):
            return
        where = _gather([(ids, bool(finite)) for ids, finite in self._window])
        for p in parameters:
            p.grad = None  # every optimiser leaves a parameter without gradient alone: no decay, no momentum
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for adapter in _adapters(pl_module):
            adapter.forget_loads()
        self.skipped += 1
        culprits = [ids for ids, finite in where if not finite] or [ids for ids, _ in where]
        what = "loss" if not all(finite for _, finite in where) else "gradient"
        message = f"The {what} of step {trainer.global_step + 1} is not finite; example ids: {culprits}."
        board = Board(trainer)
        if self.skipped > self.skip:
            self._stop = message
            board.text("alerts/nonfinite", message)
        else:
            board.warn("nonfinite", f"{message} The step is left out ({self.skipped} of at most {self.skip}).")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_ends(trainer):
            return
        self._window.clear()
        if self._stop is not None:
            path = Path(directory(trainer)) / "nonfinite.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            raise UserError(
                f"{self._stop} The weights before that step are saved in {path}. Look at those examples, lower the "
                "learning rate or clip gradients; resuming from that file goes on after this step. To leave out such "
                "steps set skip of the callback FiniteGuard."
            )


def _adapters(pl_module: L.LightningModule) -> list[Any]:
    return list(getattr(getattr(pl_module, "model", None), "talklora", {}).values())  # type: ignore[union-attr]


def _gather(local: list[Any]) -> list[Any]:
    if not dist.is_initialized():
        return local
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local)
    return [item for part in parts for item in part]
