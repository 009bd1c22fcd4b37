"""Optimiser: groups of trained tensors, a trial without any weights, and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from talklora_pl.errors import UserError


@dataclass
class ParamGroup:
    """Settings of the trained tensors whose name matches.

    Attributes:
        match: regular expression, searched in names such as ``layers.model.layers.0.self_attn.q_proj.router.weight``.
        lr: learning rate; the optimiser's by default.
        weight_decay: the optimiser's by default.
    """

    match: str
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for key in ("lr", "weight_decay"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"{key} must be at least 0, got {getattr(self, key)}")


def grouped(trained: Mapping[str, nn.Parameter], settings: Sequence[ParamGroup]) -> list[dict[str, Any]]:
    """What an optimiser takes: tensors by the first setting that matches their name, the others in a group before.

    Raises:
        UserError: a setting matches no tensor that an earlier one has left.
    """
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(len(settings) + 1)]
    for group, options in zip(groups[1:], settings, strict=True):
        group |= {k: v for k, v in (("lr", options.lr), ("weight_decay", options.weight_decay)) if v is not None}
    for name, p in trained.items():
        hit = next((i for i, g in enumerate(settings, 1) if re.search(g.match, name)), 0)
        groups[hit]["params"].append(p)
    for group, options in zip(groups[1:], settings, strict=True):
        if not group["params"]:
            names = list(trained)
            raise UserError(
                f"model.param_groups: {options.match!r} matches no trained tensor. "
                f"Their names look like {', '.join(names[:1] + names[-3:])}."
            )
    return [g for g in groups if g["params"]]


def try_optimizer(
    optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, groups: list[dict[str, Any]]
) -> None:
    """Do the optimiser and the schedule take their options? Tried on one number for every tensor.

    Raises:
        UserError: they do not.
    """
    tiny = [g | {"params": [nn.Parameter(torch.zeros([1] * p.dim())) for p in g["params"]]} for g in groups]
    part = "optimizer"
    try:
        made = optimizer(tiny)
        part = "lr_scheduler"
        if lr_scheduler is not None:
            watched(lr_scheduler(made))
    except (ArithmeticError, TypeError, ValueError) as e:
        raise UserError(f"model.{part}: {e}") from e


def watched(scheduler: Any) -> str | None:
    """The metric that a schedule watches, if it is one that does.

    Raises:
        ValueError: it is, and does not say which.
    """
    monitor = getattr(scheduler, "monitor", None)
    if isinstance(scheduler, ReduceLROnPlateau) and monitor is None:
        raise ValueError(
            "torch's own ReduceLROnPlateau does not say which metric it watches. Name that of Lightning, which does: "
            "{class_path: ReduceLROnPlateau, init_args: {monitor: val_loss}}."
        )
    return monitor


class WarmupLinear(LambdaLR):
    """Factor s/warmup up to step ``warmup_steps``, then linearly to 0 at ``total_steps``.

    Args:
        warmup_steps: optimiser steps; a value below 1 is a share of total_steps.
        total_steps: optimiser steps; None means those of the whole fit (FineTuner fills it in).
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 0, total_steps: int | None = None) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        total = self.total_steps or math.inf
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * (self.total_steps or 0)
        if step < warmup:
            return step / warmup
        if math.isinf(total):
            return 1.0
        return self.decay(min(1.0, (step - warmup) / max(1.0, total - warmup)))

    def decay(self, progress: float) -> float:
        """Factor after warm-up for a progress in [0, 1]."""
        return 1 - progress


class WarmupCosine(WarmupLinear):
    """Like :class:`WarmupLinear` with half a cosine, (1 + cos(pi p)) / 2, in place of the line."""

    def decay(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2
