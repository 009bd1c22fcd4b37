"""Numbers of a step on the way to the host: the same numbers, in one transfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from talklora_pl.callbacks import LoadBalance
from talklora_pl.monitoring import host

TIMED = ("cost/tokens_per_second", "cost/peak_memory_gib")


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


def test_what_comes_to_the_host_is_bit_for_bit_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "waits", lambda tensor: True)
    transfers: list[Tensor] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda t: transfers.append(t) or cpu(t))
    sent = [
        torch.tensor(1 / 3, dtype=torch.float64),
        torch.tensor(2**53 + 1),
        torch.tensor([True, False, True]),
        torch.tensor(float("nan"), dtype=torch.bfloat16),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.ones(1).expand(4),
        torch.zeros(0, 3),
        torch.tensor(-0.0, requires_grad=True),
    ]
    found = host.to_host(sent)
    assert len(transfers) == 1
    for before, after in zip(sent, found, strict=True):
        assert after.dtype == before.dtype and after.shape == before.shape and not after.requires_grad
        assert bits(after) == bits(before)


def test_loggers_get_the_same_numbers(fit: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read one by one or together; what a callback of one's own logs, and means over the epoch, too."""
    logged: list[Any] = []

    class Log(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append((step, [(name, value) for name, value in metrics.items() if name not in TIMED]))

    class Mine(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            value = torch.tensor(1 / 3, dtype=torch.float64) * trainer.global_step
            pl_module.log("mine/both", value, on_step=True, on_epoch=True, batch_size=1)
            pl_module.log("mine/half", value.half(), batch_size=1)
            pl_module.log("mine/number", trainer.global_step / 3, batch_size=1)

    seen = []
    for together in (False, True):
        monkeypatch.setattr(host, "waits", lambda tensor, together=together: together)
        fit(Mine(), LoadBalance(figures=False), logger=Log(), max_steps=4, log_every_n_steps=1, val_check_interval=2)
        seen.append(logged.copy())
        logged.clear()
    assert seen[0] == seen[1] and {"mine/both_step", "mine/both_epoch"} <= {
        name for _, row in seen[1] for name, _ in row
    }
