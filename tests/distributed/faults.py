"""Callbacks that hurt a run at a chosen moment."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from talklora_pl import captured, ranks
from tests import tape


class SignalAt(L.Callback):
    """Send this process a signal in optimiser step `step` (counted from 0).

    Args:
        step: in which step.
        where: ``train`` (before its first micro-batch), ``validation`` (amid the validation after it), ``start``
            (before the first step of all).
        name: of the signal.
        rank: which process gets it.
    """

    def __init__(self, step: int, where: str = "train", name: str = "SIGTERM", rank: int = 0) -> None:
        self.step, self.where, self.number, self.rank = step, where, getattr(signal, name), rank

    def _fire(self, trainer: L.Trainer, where: str) -> None:
        if trainer.global_step == self.step and where == self.where and trainer.global_rank == self.rank:
            self.step = -1
            os.kill(os.getpid(), self.number)

    def on_fit_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._fire(trainer, "start")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._fire(trainer, "train")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._fire(trainer, "validation")


class Progress(L.Callback):
    """Tell the outside where the run is, in the file `folder`/step.<rank>; and take time."""

    def __init__(self, folder: str, sleep: float = 0.0) -> None:
        self.folder, self.sleep = Path(folder), sleep

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        time.sleep(self.sleep)
        part = self.folder / f".step.{trainer.global_rank}"
        part.write_text(f"{trainer.global_step} {os.getpid()}")
        part.replace(self.folder / f"step.{trainer.global_rank}")


class Poison(L.Callback):
    """Make the loss or the gradient of some micro-batches NaN.

    Args:
        batches: micro-batches, counted over the whole run.
        what: ``loss`` or ``gradient``.
        rank: in which process.
    """

    def __init__(self, batches: list[int], what: str = "gradient", rank: int = 0) -> None:
        self.batches, self.what, self.rank = batches, what, rank

    def _hit(self, trainer: L.Trainer) -> bool:
        return trainer.fit_loop.epoch_loop.total_batch_idx in self.batches and trainer.global_rank == self.rank

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        if self.what == "loss" and self._hit(trainer):
            loss.data.fill_(float("inf"))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.what == "gradient" and self._hit(trainer):
            next(p for p in pl_module.parameters() if p.requires_grad).grad.fill_(float("nan"))


class Collectives(L.Callback):
    """What the processes ask each other in each step, as JSON in `folder`/collectives.<rank>.

    Hosts get a group of their own, as they do beside NCCL: what goes by it (``hosts``) waits for no device.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.steps: list[list[str]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        hosts = dist.new_group(backend="gloo")
        ranks._hosts = lambda world: hosts  # type: ignore[assignment, misc]
        for name in ("barrier", "all_reduce", "broadcast", "broadcast_object_list", "all_gather_object"):
            setattr(dist, name, self._seen(name, getattr(dist, name), hosts))

    def _seen(self, name: str, collective: Callable[..., Any], hosts: Any) -> Callable[..., Any]:
        def seen(*args: Any, **kwargs: Any) -> Any:
            if self.steps:
                self.steps[-1].append("hosts" if kwargs.get("group") is hosts else name)
            return collective(*args, **kwargs)

        return seen

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.steps.append([])

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        (self.folder / f"collectives.{trainer.global_rank}").write_text(json.dumps(self.steps))


class MemoryLimit(L.Callback):
    """From here on the process may take so many more megabytes (not counting files mapped read-only).

    The most that it did take (anonymous pages in memory, looked at every millisecond) goes to `folder`/peak.<rank>,
    the most until the first step to `folder`/loaded.<rank>.
    """

    def __init__(self, megabytes: int, folder: str) -> None:
        self.megabytes, self.folder = megabytes, Path(folder)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        most = data + self.megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        self.file = self.folder / f"peak.{trainer.global_rank}"
        self.file.write_text("0")
        threading.Thread(target=self._watch, daemon=True).start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shutil.copyfile(self.file, self.folder / f"loaded.{trainer.global_rank}")

    def _watch(self) -> None:
        peak, before = 0, _anonymous()
        while True:
            if (now := _anonymous()) > peak:
                peak = now
                self.file.write_text(str((peak - before) / 2**20))
            time.sleep(0.001)


def _anonymous() -> int:
    _, resident, shared, *_ = (int(pages) for pages in Path("/proc/self/statm").read_text().split())
    return (resident - shared) * resource.getpagesize()


class Figures(L.Callback):
    """Every so many steps: step, anonymous megabytes, open files, seconds since the last line, in `folder`/figures."""

    def __init__(self, folder: str, every: int = 100) -> None:
        self.file, self.every = Path(folder) / "figures", every

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            files, now = len(list(Path("/proc/self/fd").iterdir())), time.perf_counter()
            took = now - getattr(self, "before", now)
            with open(self.file, "a") as f:
                print(trainer.global_step, _anonymous() / 2**20, files, took, file=f)
            self.before = now


class Metrics(L.Callback):
    """What an evaluation logged, in `folder`/metrics.json."""

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / "metrics.json"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.file.write_text(json.dumps({name: float(v) for name, v in trainer.callback_metrics.items()}))


class Recorder(L.Callback):
    """CUDA graphs on a CPU, by :mod:`tests.tape`; leaves the number of steps that were replayed in `file`.<rank>."""

    def __init__(self, file: str) -> None:
        self.file = file

    def setup(self, *args: Any, **kwargs: Any) -> None:
        captured.KIND, captured.cuda_graphs = "cpu", lambda: tape.record

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        Path(f"{self.file}.{trainer.global_rank}").write_text(str(pl_module._captured.turn))
