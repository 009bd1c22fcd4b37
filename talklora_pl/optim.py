"""Optimiser: groups of trained tensors, a trial without any weights, and learning-rate schedules."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from talklora_pl.errors import UserError
from talklora_pl.internals.torch import FUSED


@dataclass
class ParamGroup:
    """Settings of the trained tensors whose name matches.

    Attributes:
        match: regular expression, searched in names such as ``layers.model.layers.0.self_attn.q_proj.router.weight``.
        lr: learning rate; the optimiser's by default.
        weight_decay: the optimiser's by default.
        optional: it may match nothing, in a config for several bases or methods.
    """

    match: str
    lr: float | None = None
    weight_decay: float | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        for key in ("lr", "weight_decay"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"{key} must be at least 0, got {getattr(self, key)}")


def grouped(trained: Mapping[str, nn.Parameter], settings: Sequence[ParamGroup]) -> list[dict[str, Any]]:
    """What an optimiser takes: tensors by the first setting that matches their name, the others in a group before.

    Raises:
        UserError: a setting that is not optional matches no tensor that an earlier one has left.
    """
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(len(settings) + 1)]
    for group, options in zip(groups[1:], settings, strict=True):
        group |= {k: v for k, v in (("lr", options.lr), ("weight_decay", options.weight_decay)) if v is not None}
    for name, p in trained.items():
        hit = next((i for i, g in enumerate(settings, 1) if re.search(g.match, name)), 0)
        groups[hit]["params"].append(p)
    for group, options in zip(groups[1:], settings, strict=True):
        if not (group["params"] or options.optional):
            names = list(trained)
            raise UserError(
                f"model.param_groups: {options.match!r} matches no trained tensor. "
                f"Their names look like {', '.join(names[:1] + names[-3:])}."
            )
    return [g for g in groups if g["params"]]


def take_fused_kernels(optimizer: Optimizer) -> None:
    """Let an optimiser of torch use its fused kernels, where all that it trains is on GPUs and its options leave it the
    choice, for which it would take a dozen kernels instead of one.

    Not Adagrad: it makes its state with the option as it was given, and in torch 2.11 has no such kernel for a GPU.
    """
    for group in optimizer.param_groups:
        free = "fused" in group and group["fused"] is None and group.get("foreach") is None
        if not free or group.get("differentiable") or not all(p.is_cuda for p in group["params"]):
            return
    if type(optimizer) in FUSED and type(optimizer) is not torch.optim.Adagrad:
        for group in optimizer.param_groups:
            group["fused"] = True


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
    except (ArithmeticError, ImportError, TypeError, ValueError) as e:
        shapes = [tuple(p.shape) for g in groups for p in g["params"]]
        others = [shape for shape in shapes if len(shape) != 2]
        if part == "optimizer" and others and re.search(r"\b2-?D\b", str(e)):  # torch.optim.Muon
            raise UserError(
                f"model.optimizer: this one takes matrices alone, and {len(others)} of the {len(shapes)} trained "
                f"tensors are none, such as a stack of experts of shape {max(others, key=len)}. Take one for tensors "
                "of any shape: AdamW, Adafactor, bitsandbytes.optim.AdamW8bit."
            ) from e
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


class WarmupSchedule(LambdaLR, ABC):
    """A factor of every group's learning rate: s/warmup in step s of the warm-up, then from 1 down to the floor.

    Args:
        warmup_steps: optimiser steps; a value below 1 is a share of total_steps.
        total_steps: optimiser steps; None means those of the whole fit (FineTuner fills it in).
        warmup_ratio: the warm-up as a share of total_steps, in place of warmup_steps.
        min_lr_ratio: the floor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: float = 0,
        total_steps: int | None = None,
        warmup_ratio: float | None = None,
        min_lr_ratio: float = 0.0,
    ) -> None:
        if warmup_ratio is not None and warmup_steps:
            raise ValueError(f"warmup_steps {warmup_steps} and warmup_ratio {warmup_ratio} exclude each other")
        for name, value in (("warmup_ratio", warmup_ratio), ("min_lr_ratio", min_lr_ratio)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        # one number says both
        self.warmup_steps = warmup_steps if warmup_ratio is None else min(warmup_ratio, 1 - 1e-9)
        self.min_lr_ratio = min_lr_ratio
        self.total_steps = total_steps
        super().__init__(optimizer, self.factor)

    def plan(self, total_steps: int) -> None:
        """Take the number of steps, and begin anew with it: the rate of the first step may depend on it."""
        self.total_steps = total_steps
        LambdaLR.__init__(self, self.optimizer, self.factor)

    def factor(self, step: int) -> float:
        total = self.total_steps or math.inf
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * (self.total_steps or 0)
        if step < warmup:
            return step / warmup
        if math.isinf(total):
            return 1.0
        decay = self.decay(min(1.0, (step - warmup) / max(1.0, total - warmup)))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * decay

    @abstractmethod
    def decay(self, progress: float) -> float:
        """From 1 to 0 for a progress in [0, 1] after warm-up."""


class WarmupLinear(WarmupSchedule):
    """Warm-up, then a line."""

    def decay(self, progress: float) -> float:
        return 1 - progress


class WarmupCosine(WarmupSchedule):
    """Warm-up, then half a cosine, (1 + cos(pi p)) / 2."""

    def decay(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class WarmupConstant(WarmupSchedule):
    """Warm-up, then the rate as it is: decay_ratio of the steps after it, the last ones, go down to the floor in a
    line (warm-up, stable, decay). Other options as for :class:`WarmupSchedule`.

    Args:
        decay_ratio: share of the steps after the warm-up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: float = 0,
        total_steps: int | None = None,
        warmup_ratio: float | None = None,
        min_lr_ratio: float = 0.0,
        decay_ratio: float = 0.0,
    ) -> None:
        if not 0 <= decay_ratio <= 1:
            raise ValueError(f"decay_ratio must be in [0, 1], got {decay_ratio}")
        self.decay_ratio = decay_ratio
        super().__init__(optimizer, warmup_steps, total_steps, warmup_ratio, min_lr_ratio)

    def decay(self, progress: float) -> float:
        return min(1.0, (1 - progress) / self.decay_ratio) if self.decay_ratio else 1.0
