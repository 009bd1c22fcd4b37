"""How training goes and what it costs, in the steps that the trainer logs."""

from __future__ import annotations

import re
import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from talklora_pl.adapter_module import AdapterModule
from talklora_pl.ranks import over_ranks


class RunMetrics(L.Callback):
    """Logs learning rates, the gradient's norm, speed, pads and memory; :class:`FineTuner` brings it along.

    ==========================  ===========================================================================
    ``train/lr``                learning rate of the step; of a parameter group ``train/lr_NAME``
    ``train/grad_norm``         2-norm over all trained tensors, of the mean over ranks, before clipping
    ``cost/tokens_per_second``  tokens without pads of all ranks since the step logged before, by the time
                                without validations
    ``cost/pad_share``          pads among all positions of the step's batches
    ``cost/peak_memory_gib``    largest so far of the first process: allocated on its GPU, else resident
    ==========================  ===========================================================================

    What depends on the machine and on how steps are cut into batches is under ``cost/``. Other steps compute nothing.
    """

    def __init__(self) -> None:
        self._step = 0
        self._since: float | None = None  # when the tokens began to be counted
        self._pause = 0.0  # began at; of a validation
        self._tokens = 0
        self._in_step = [0, 0]  # tokens, positions

    def on_train_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        self._since, self._tokens = None, 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: AdapterModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step
        if self._since is None:
            self._since = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: AdapterModule, optimizer: Optimizer) -> None:
        if not logs(trainer, trainer.global_step):
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        pl_module.log("train/grad_norm", get_total_norm(grads), batch_size=1)
        names = [f"_{re.sub(r'[^A-Za-z0-9_.-]+', '_', setting.match)}" for setting in pl_module.param_groups]
        names = ["", *names][-len(optimizer.param_groups) :]  # the first is of all others, if there are any
        for name, group in zip(names, optimizer.param_groups, strict=True):
            pl_module.log(f"train/lr{name}", float(group["lr"]), batch_size=1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: AdapterModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "tokens" not in batch:  # of another data module
            return
        self._tokens += batch["tokens"]
        self._in_step[0] += batch["tokens"]
        self._in_step[1] += batch["attention_mask"].numel()
        if trainer.global_step == self._step:  # further micro-steps of this optimiser step follow
            return
        if logs(trainer, self._step):
            self._log_cost(trainer, pl_module)
        self._in_step = [0, 0]

    def _log_cost(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        counts = over_ranks([self._tokens, *self._in_step], "sum")
        now = time.perf_counter()
        assert self._since is not None
        values = {
            "tokens_per_second": counts[0] / (now - self._since),
            "pad_share": 1 - counts[1] / max(1, counts[2]),
            "peak_memory_gib": peak_memory(pl_module.device) / 2**30,
        }
        pl_module.log_dict({f"cost/{name}": value for name, value in values.items()}, batch_size=1)
        self._since, self._tokens = now, 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        if self._since is not None:
            self._since += time.perf_counter() - self._pause


def logs(trainer: L.Trainer, step: int) -> bool:
    """Whether the trainer logs the optimiser step that follows `step` others."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (step + 1) % every == 0


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
