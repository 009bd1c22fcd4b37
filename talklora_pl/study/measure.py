"""What a run of a study costs and how it goes: kept in its checkpoints, so that an interrupted run measures on, and
written to the run's folder when the fit has ended."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from talklora_pl.adapter_module import AdapterModule
from talklora_pl.callbacks.load_balance import LoadBalance
from talklora_pl.durable import write_whole

FILE = "measured.json"


class Measure(L.Callback):
    """Seconds of every optimiser step, peak memory, and all scores of every validation.

    Attributes:
        seconds: of every step but the first of a process; validations do not count.
        peak: bytes; of the GPU, or resident in main memory.
        curve: of every validation, the step and all logged values.
        parameters: how many are trained.
        load: relative load (1 is ideal) of every expert by layer, over the newest validation.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = 0
        self.curve: list[dict[str, float]] = []
        self.parameters = 0
        self.load: dict[str, list[float]] = {}
        self._began: float | None = None
        self._warm = False

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("seconds", "peak", "curve", "parameters", "load")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)

    def on_fit_end(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        text = json.dumps(self.state_dict())
        write_whole(Path(trainer.log_dir or "") / FILE, lambda part: part.write_text(text, encoding="utf-8"))

    def on_train_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        self._warm, self._began = False, None
        self.parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        _forget_peak(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self._began is None:
            self._began, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: AdapterModule, *args: Any) -> None:
        if self._began is None or trainer.global_step == self._step:
            return  # a micro-step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if self._warm:
            self.seconds.append(time.perf_counter() - self._began)
        self._warm, self._began = True, None
        self.peak = max(self.peak, _peak(pl_module.device))

    def on_validation_end(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        keep = {k: v for k, v in values.items() if k.startswith(("val_", "sensitivity/")) and math.isfinite(v)}
        self.curve.append({"step": trainer.global_step, **keep})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LoadBalance) and (load := callback.latest) is not None:
                rows = zip(load.layers, load.relative_LE.tolist(), load.experts_L.tolist(), strict=True)
                self.load = {name: row[:experts] for name, row, experts in rows}


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: the peak of resident memory begins anew
    except OSError:
        pass


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
