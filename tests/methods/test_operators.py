"""How many operators an adapted Linear costs, forward and backward: bf16 base, float32 adapters, 3-D input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from talklora_pl.adapter import inject
from tests.methods.test_configs import config_of
from tests.operators import forward_and_backward


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def count(method: str, dropout: float = 0.0) -> int:
    """Operators of one Linear with this method, the frozen products (2) among them."""
    model = One()
    inject(model, replace(config_of(method), targets=["q_proj"], dropout_input=dropout))
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    return len(forward_and_backward(model.train(), x, torch.randn(2, 16, 48, dtype=torch.bfloat16)))


def test_counter() -> None:
    model = One().requires_grad_(False)
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    assert forward_and_backward(model, x, torch.ones(2, 16, 48, dtype=torch.bfloat16)) == ["mm.default"] * 2


@pytest.mark.parametrize("method, most", [("lora", 12), ("talklora", 31), ("talklora_no_talk", 26), ("moelora", 21)])
def test_linear_methods(method: str, most: int) -> None:
    n = count(method)
    assert n <= most
    # with dropout, scores that come from x itself are a product of their own
    assert count(method, dropout=0.05) <= n + (10 if method == "moelora" else 8)


@pytest.mark.parametrize(
    "method, times", [("talklora_gnn", 1.6), ("talklora_attention", 1.6), ("talklora_mlp_mixer", 2.2)]
)
def test_communication(method: str, times: float) -> None:
    assert count(method) <= times * count("talklora")
