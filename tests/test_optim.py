"""Schedules: warm-up by share, the floor, the whole fit's steps; an optimiser that takes matrices only."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from talklora_pl.errors import UserError
from talklora_pl.optim import (
    ParamGroup,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    grouped,
    take_fused_kernels,
    try_optimizer,
)


def rates(schedule: type[Any], steps: int = 9, planned: bool = False, **options: Any) -> list[float]:
    """Learning rates of the first steps, of an optimiser whose rate is 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    if planned:
        made = schedule(optimizer, **options)
        made.plan(8)
    else:
        made = schedule(optimizer, total_steps=8, **options)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return out


@pytest.mark.parametrize("planned", [False, True])
def test_factors(planned: bool) -> None:
    line = [0, 0.5, 1, *(0.1 + 0.9 * (1 - i / 6) for i in range(1, 7))]
    assert rates(WarmupLinear, planned=planned, warmup_ratio=0.25, min_lr_ratio=0.1) == pytest.approx(line)
    assert rates(WarmupLinear, planned=planned, warmup_steps=2, min_lr_ratio=0.1) == pytest.approx(line)
    assert rates(WarmupLinear, planned=planned, warmup_steps=0.25, min_lr_ratio=0.1) == pytest.approx(line)
    half = [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(7)]
    assert rates(WarmupCosine, planned=planned, warmup_ratio=0.25) == pytest.approx([0, 0.5, *half])
    stable = [0, 0.5, 1, 1, 1, 1, 1, 0.5, 0]
    assert rates(WarmupConstant, planned=planned, warmup_ratio=0.25, decay_ratio=1 / 3) == pytest.approx(stable)
    assert rates(WarmupConstant, planned=planned, warmup_ratio=1.0)[-2:] == pytest.approx([7 / 8, 1])


def test_plan_begins_with_the_warm_up() -> None:
    """A share is of a number that is known late; the first step has the rate of the plan all the same."""
    assert rates(WarmupLinear, 1, planned=True, warmup_ratio=0.5) == [0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "exclude each other"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\]"),
        ({"min_lr_ratio": -0.1}, r"min_lr_ratio must be in \[0, 1\]"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rates(WarmupCosine, **options)


def test_an_optimiser_for_matrices_is_refused_before_the_run() -> None:
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.zeros(4, 2, 3)), nn.Parameter(torch.zeros(4, 4))]}]
    muon = lambda p: torch.optim.Muon(p, lr=0.1)  # noqa: E731
    with pytest.raises(UserError, match=r"1 of the 2 trained tensors are none, .* shape \(4, 2, 3\)"):
        try_optimizer(muon, None, groups)
    try_optimizer(muon, None, [{"params": groups[0]["params"][1:]}])


def test_a_group_that_matches_nothing_is_a_mistake_unless_it_is_optional() -> None:
    trained = {"layers.0.A": nn.Parameter(torch.zeros(1))}
    with pytest.raises(UserError, match=r"'layers.29' matches no trained tensor"):
        grouped(trained, [ParamGroup("layers.29", lr=0.1)])
    assert grouped(trained, [ParamGroup("layers.29", lr=0.1, optional=True)]) == [{"params": [*trained.values()]}]


@pytest.mark.parametrize(
    ("name", "options", "fused"),
    [
        ("AdamW", {}, True),
        ("SGD", {}, True),
        ("AdamW", {"foreach": True}, None),
        ("NAdam", {}, None),
        ("Adagrad", {}, None),  # torch 2.11: for a CPU alone
    ],
)
def test_what_trains_on_a_gpu_by_fused_kernels(name: str, options: dict[str, Any], fused: bool | None) -> None:
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.zeros(1))], lr=0.1, **options)
    optimizer.param_groups[0]["params"] = [SimpleNamespace(is_cuda=True)]
    take_fused_kernels(optimizer)
    assert optimizer.param_groups[0].get("fused") is fused
