"""The optimiser's groups of trained tensors, and a trial of an optimiser without any weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

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
            lr_scheduler(made)
    except (ArithmeticError, TypeError, ValueError) as e:
        raise UserError(f"model.{part}: {e}") from e
