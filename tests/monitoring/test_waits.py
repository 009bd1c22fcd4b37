"""A training step that logs nothing never asks the device for a number: the host would wait until all kernels are done.

On a CPU nothing waits; a dispatch mode sees the operators that would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from rich.console import Console
from torch.utils._python_dispatch import _disable_current_modes

from talklora_pl.adapter.inject import Adapter
from talklora_pl.callbacks import LoadBalance, RunMetrics, progress
from talklora_pl.callbacks.progress import EpochProgress
from talklora_pl.data.batches import Batches
from talklora_pl.module import FineTuner
from tests.methods.test_configs import config_of
from tests.operators import Waits

METHODS = sorted(p.stem for p in (Path(__file__).parents[2] / "configs/method").glob("*.yaml"))


def watch(monkeypatch: pytest.MonkeyPatch, *methods: tuple[type, str]) -> Waits:
    """Look at what happens inside of these methods."""
    waits = Waits()
    for owner, name in methods:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def watched(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            with waits:
                return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
    return waits


def test_what_is_seen() -> None:
    v, keep = torch.arange(4.0), torch.tensor([True, False, True, True])
    seen: list[Callable[[], Any]] = [
        lambda: v.sum().item(),
        lambda: bool(keep.all()),
        lambda: v[keep],
        lambda: keep.nonzero(),
        lambda: v.unique(),
        lambda: v.long().bincount(),
        lambda: v.masked_select(keep),
        lambda: v.repeat_interleave(v.long()),
    ]
    for code in seen:
        with Waits() as waits:
            code()
        assert waits.names
    with Waits() as waits:
        v[torch.tensor([0, 2])], torch.where(keep, v, 0), v.index_select(0, torch.tensor([1])), v[1:], v[2]
    assert waits.names == []


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_logs_nothing(method: str, fit: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    waits = watch(
        monkeypatch,
        (FineTuner, "training_step"),
        (FineTuner, "backward"),
        (FineTuner, "on_after_backward"),
        (FineTuner, "on_train_batch_end"),
        (Adapter, "after_optimizer_step"),
        (LoadBalance, "on_train_batch_start"),
        (LoadBalance, "on_train_batch_end"),
    )
    trainer = fit(
        LoadBalance(),
        adapter=replace(config_of(method), allocation=config_of("lora").allocation),
        max_steps=2,
        log_every_n_steps=50,
        limit_val_batches=0,
        logger=False,
    )
    assert trainer.global_step == 2 and waits.names == []


def test_whole_steps_with_all_that_watches_them(fit: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bar and all metrics: a step that logs nothing asks nothing; one that logs asks when all is under way."""
    asked: dict[int, list[str]] = {}
    monkeypatch.setattr(progress, "waits", lambda device: True)
    advance, step, fetch = _TrainingEpochLoop.advance, torch.optim.SGD.step, Batches.__getitem__

    def watched(loop: Any, *args: Any) -> None:
        with Waits() as waits:
            monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: (step(*a, **k), waits.names.append("step"))[0])
            advance(loop, *args)
        asked[loop.trainer.global_step] = waits.names

    def fetched(*args: Any) -> Any:  # on the host, before the device is involved
        with _disable_current_modes():
            return fetch(*args)

    monkeypatch.setattr(Batches, "__getitem__", fetched)
    monkeypatch.setattr(_TrainingEpochLoop, "advance", watched)
    monkeypatch.setattr(Console, "is_terminal", True)
    fit(
        LoadBalance(),
        RunMetrics(),
        EpochProgress(),
        module={"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
        max_steps=6,
        log_every_n_steps=3,
        limit_val_batches=0,
        enable_progress_bar=True,
    )
    for at, names in asked.items():
        assert names[0] == "step", at
        assert (len(names) > 1) == (at in (3, 6))
