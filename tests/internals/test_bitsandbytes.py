"""What bitsandbytes does to a 4-bit layer that is evaluated on a CPU, and what keeps it from doing so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talklora_pl.internals.bitsandbytes import stay_differentiable

bnb = pytest.importorskip("bitsandbytes")


def layer() -> Any:
    torch.manual_seed(0)
    out = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(64, 128)
    out.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return out.to("cpu")


def gradient(linear: Any) -> Tensor | None:
    """Of the input, through the layer."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = linear(x)
    return torch.autograd.grad(y.square().sum() + 0 * x.sum(), x)[0]


def evaluate(linear: Any) -> None:
    linear.eval()
    with torch.no_grad():
        linear(torch.ones(1, 128))
    linear.train()


@pytest.mark.filterwarnings("ignore:bitsandbytes")
def test_without_help_an_evaluated_layer_has_lost_its_gradient() -> None:
    """The day this fails, what it is about can go."""
    linear = layer()
    if not linear.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
    before = gradient(linear)
    evaluate(linear)
    after = gradient(linear)
    assert (after - before).norm() > 0.5 * before.norm()
    assert stay_differentiable(nn.ModuleDict({"deep": nn.Sequential(linear)})) == "deep.0"


def test_a_layer_that_stays_as_it_is_keeps_its_gradient() -> None:
    linear = layer()
    before = gradient(linear)
    assert stay_differentiable(nn.Sequential(linear)) is None
    evaluate(linear)
    assert torch.equal(gradient(linear), before)
