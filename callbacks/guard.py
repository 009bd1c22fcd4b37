"""Notice a loss or gradient that is no number before it reaches the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from talklora_pl.callbacks.preemption import directory
from talklora_pl.errors import UserError
from talklora_pl.internals.lightning import step_ends, validation_follows
from talklora_pl.internals.torch import step_unless, version
from talklora_pl.monitoring.host import Later
from talklora_pl.monitoring.tensorboard import Board
from talklora_pl.ranks import every_rank, sum_over_ranks

Window = list[tuple[Any, Tensor]]
"""The ids of each micro-batch of an optimiser step, and whether its loss is finite."""


class Step(NamedTuple):
    """An optimiser step that the device took or left out, and what will tell."""

    number: int
    window: Window
    bad: Tensor
    """On the device, 1 or 0: also for what has to be put back there."""
    later: Later


class FiniteGuard(L.Callback):
    """Leave out an optimiser step whose loss or gradient is NaN or infinite on any rank.

    Up to `skip` such steps are left out with a warning; at the next one the run saves ``nonfinite.ckpt`` (the state
    without that step) and stops with the ids of the examples. Buffers that the step's forward passes changed (expert
    counts) are put back too. Costs one all-reduce of a number per optimiser step.

    Optimisers with ``fused: true`` (those of torch have it on a GPU) leave a step out on the device: the host
    hears of it one step later, when there is nothing to wait for, and that later step is taken. With others, and with
    the loss scaler of float16, the host waits for the number before each step.

    Args:
        skip: how many steps may be left out in the whole run.
        id_key: entry of a batch that names its examples.
    """

    def __init__(self, skip: int = 0, id_key: str = "id") -> None:
        self.skip, self.id_key = skip, id_key
        self.skipped = 0
        self._stop: str | None = None
        self._window: Window = []
        self._before: list[tuple[Tensor, Tensor, int]] = []  # buffer, copy, version that was copied
        self._step: Step | None = None

    def state_dict(self) -> dict[str, Any]:
        unseen = self._step is not None and bool(self._step.later.read())
        return {"skipped": self.skipped + unseen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window, self._before, self._step, self._stop = [], [], None, None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._window:
            self._remember_buffers(pl_module)
        ids = batch.get(self.id_key, "unknown") if isinstance(batch, dict) else "unknown"
        self._window.append((ids, torch.tensor(True)))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        ids, _ = self._window[-1]
        self._window[-1] = (ids, torch.isfinite(loss.detach()).all())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._look_back(trainer)
        number, window = trainer.global_step + 1, self._window
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        losses = torch.stack([finite.to(trainer.strategy.root_device) for _, finite in window]).all()
        norms = torch._foreach_norm([p.grad for p in parameters])
        # with float16 the loss scaler finds infinite gradients itself, and expects some
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        gradients = torch.stack(norms).isfinite().all() if norms and scaler is None else losses
        (ranks,) = sum_over_ranks(~(losses & gradients))
        bad = (ranks > 0).to(torch.float32)
        if scaler is None and step_unless(optimizer, bad):
            self._step = Step(number, window, bad, Later(bad))
        elif bool(bad):
            for p in parameters:
                p.grad = None  # every optimiser leaves a parameter without gradient alone: no decay, no momentum
            self._put_buffers_back()
            for adapter in _adapters(pl_module):
                adapter.forget_loads()
            self._left_out(trainer, number, window)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_ends(trainer):
            return
        self._window = []
        if self._step is not None and self._step.number == trainer.global_step:
            self._put_buffers_back(self._step.bad)
        if validation_follows(trainer) or trainer.is_last_batch or trainer.should_stop:
            self._look_back(trainer)
        self._end(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look_back(trainer)
        self._end(trainer)

    def _look_back(self, trainer: L.Trainer) -> None:
        """What became of the step that the device decided about."""
        step, self._step = self._step, None
        if step is not None and bool(step.later.read()):
            self._left_out(trainer, step.number, step.window)

    def _left_out(self, trainer: L.Trainer, number: int, window: Window) -> None:
        here = [(ids, bool(finite)) for ids, finite in window]
        where = [micro_batch for rank in every_rank(here) for micro_batch in rank]
        self.skipped += 1
        culprits = [ids for ids, finite in where if not finite] or [ids for ids, _ in where]
        what = "loss" if not all(finite for _, finite in where) else "gradient"
        message = f"The {what} of step {number} is not finite; example ids: {culprits}."
        board = Board(trainer)
        if self.skipped > self.skip:
            self._stop = self._stop or message
            board.text("alerts/nonfinite", message)
        else:
            board.warn("nonfinite", f"{message} The step is left out ({self.skipped} of at most {self.skip}).")

    def _end(self, trainer: L.Trainer) -> None:
        if self._stop is None:
            return
        message, self._stop = self._stop, None
        path = Path(directory(trainer)) / "nonfinite.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        raise UserError(
            f"{message} The weights without that step are saved in {path}. Look at those examples, lower the learning "
            f"rate or clip gradients; resuming from that file goes on after step {trainer.global_step}. To leave out "
            "such steps set skip of the callback FiniteGuard."
        )

    def _remember_buffers(self, pl_module: L.LightningModule) -> None:
        known = {id(buffer): (buffer, copy, at) for buffer, copy, at in self._before}
        self._before = []
        # those of the frozen base never change, and of the adapter's few do
        for buffer in (b for adapter in _adapters(pl_module) for b in adapter.buffers()):
            found = known.get(id(buffer))
            if found is None or found[2] != version(buffer):
                found = (buffer, buffer.clone(), version(buffer))
            self._before.append(found)

    def _put_buffers_back(self, bad: Tensor | None = None) -> None:
        """All that changed since, on the device if `bad` decides there."""
        put = None if bad is None else bad > 0
        for buffer, copy, at in self._before:
            if version(buffer) != at:
                buffer.copy_(copy if put is None else torch.where(put, copy, buffer))


def _adapters(pl_module: L.LightningModule) -> list[Any]:
    return list(getattr(getattr(pl_module, "model", None), "talklora", {}).values())  # type: ignore[union-attr]
