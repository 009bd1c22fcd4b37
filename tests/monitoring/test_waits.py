"""A training step that logs nothing never asks the device for a number: the host would wait until all kernels are done.

One that logs asks once. On a CPU nothing waits; a dispatch mode sees the operators that would.
"""

from __future__ import annotations

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

from talklora_pl.callbacks import FiniteGuard, LoadBalance, Preemption, RunMetrics, progress
from talklora_pl.callbacks.progress import EpochProgress
from talklora_pl.data.batches import Batches
from talklora_pl.monitoring import host
from tests.methods.test_configs import config_of
from tests.operators import Reads, Waits

METHODS = sorted(p.stem for p in (Path(__file__).parents[2] / "configs/method").glob("*.yaml"))


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
        with Reads() as reads:
            code()
        assert reads.reads
    with Waits() as waits:
        v[torch.tensor([0, 2])], torch.where(keep, v, 0), v.index_select(0, torch.tensor([1])), v[1:], v[2]
    assert waits.names == []
    transfers: list[Callable[[], Any]] = [
        v.cpu,
        v.tolist,
        v.numpy,
        lambda: v.to("cpu"),
        lambda: torch.zeros(4).copy_(v),
    ]
    for code in [*transfers, lambda: torch.tensor(1.0, device=v.device).item()]:
        with Reads() as reads:
            code()
        assert len(reads.reads) == 1
    with Reads() as reads:
        copy = (v * 2).cpu()
        copy.sum().item(), copy[0].tolist(), torch.tensor(2.0).item(), (copy.double() > 1).numpy()
    assert reads.reads == ["cpu"] and reads.waits(v + copy)


def watch(fit: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch, *bars: L.Callback, **options: Any) -> Any:
    """A fit with all that watches it, on what passes for a device; the waits of every step (:class:`Reads`)."""
    asked: dict[int, tuple[list[str], list[str]]] = {}
    advance, step, fetch = _TrainingEpochLoop.advance, torch.optim.SGD.step, Batches.__getitem__
    reads = Reads()

    def watched(loop: Any, *args: Any) -> None:
        at = loop.trainer.global_step + 1
        asked.setdefault(at, ([], []))
        reads.names, reads.reads = asked[at]
        with reads:
            advance(loop, *args)

    def stepped(*args: Any, **kwargs: Any) -> Any:
        done = step(*args, **kwargs)
        reads.names.append("step")
        reads.reads.append("step")
        return done

    def fetched(*args: Any) -> Any:  # on the host, before the device is involved
        with _disable_current_modes():
            return fetch(*args)

    monkeypatch.setattr(host, "waits", reads.waits)
    monkeypatch.setattr(progress, "waits", reads.waits)
    monkeypatch.setattr(Batches, "__getitem__", fetched)
    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    monkeypatch.setattr(_TrainingEpochLoop, "advance", watched)
    monkeypatch.setattr(Console, "is_terminal", True)
    fit(
        *bars,
        module={"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True)},
        log_every_n_steps=2,
        limit_val_batches=0,
        enable_progress_bar=True,
        **options,
    )
    return asked


@pytest.mark.parametrize("method", METHODS)
def test_whole_steps_with_all_that_watches_them(
    method: str, fit: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bar, all metrics, alerts and the guard: a step that logs nothing asks nothing; one that logs asks once,
    when all is under way."""
    watchers = [RunMetrics(), EpochProgress(), LoadBalance(figures=False), FiniteGuard(), Preemption()]  # a run's order
    adapter = replace(config_of(method), allocation=config_of("lora").allocation)
    asked = watch(fit, monkeypatch, *watchers, adapter=adapter, max_steps=2)
    (first, reads), (_, then) = asked[1], asked[2]
    assert first == reads == ["step"] and then == ["step", "cpu"]


def test_the_bar_shows_the_loss_that_was_read_for_the_loggers(
    fit: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[int, Any] = {}
    losses: dict[int, torch.Tensor] = {}

    class Shown(EpochProgress):
        def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
            shown = super().get_metrics(trainer, pl_module)
            said[trainer.global_step] = shown.get("train_loss")
            return shown

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            losses[trainer.global_step] = trainer.callback_metrics.get("train_loss", torch.zeros(()))

    options: dict[str, Any] = {"max_steps": 3, "accumulate_grad_batches": 2}
    asked = watch(fit, monkeypatch, LoadBalance(mode="detailed", figures=False), Shown(), Losses(), **options)
    assert [reads for _, reads in asked.values()] == [["step"], ["step", "cpu"], ["step"]]
    # of step 2 as soon as the next batch begins
    assert said == {0: None, 1: None, 2: float(losses[2]), 3: float(losses[2])} and losses[2] != losses[3]
