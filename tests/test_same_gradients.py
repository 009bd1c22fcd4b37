"""A comparison of two ways to the gradients finds what differs, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from talklora_pl.same_gradients import difference


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_what_differs_is_found_and_nothing_changes(wrong: bool, autocast: bool) -> None:
    layer, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)), torch.randn(64, 4)
    trained = list(layer.parameters())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x).float().sum(), trained)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # autocast keeps the casts of the weights
        before = layer.eval()(x)
        layer.train()
        state = torch.get_rng_state()
        said = difference(trained, gradients, lambda: [g * (0.9 if wrong else 1) for g in gradients()], torch.float32)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(layer.eval()(x), before)
    assert ("away from that of the plain computation" in said) == wrong


def test_an_error_leaves_no_trace_either() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()

    def fails() -> tuple[Tensor, ...]:
        raise ValueError("no")

    with pytest.raises(ValueError):
        difference(list(layer.parameters()), fails, fails, torch.float32)
    assert torch.equal(layer.weight, before)
