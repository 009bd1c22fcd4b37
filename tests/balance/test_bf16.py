"""Balance losses in bf16 training are those of float32: finite, and with the same gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from talklora_pl import registry
from talklora_pl.balance import Balance, balance_losses
from talklora_pl.routers.top_k import keep_best
from talklora_pl.routing import Routing, RoutingRecord

T, E = 3000, 8


def loss_and_gradient(name: str, x_TE: Tensor, mixed: bool) -> tuple[Tensor, Tensor]:
    """Of `balance_losses` over two layers with router logits x and -x, a tenth of the tokens being pads."""
    x_TE = x_TE.clone().requires_grad_()
    mask_T = torch.arange(T) % 10 > 0
    task_types = {"task_types_B": torch.arange(T) % 2, "shape": (T, 1)} if name == "localised" else {}
    records = []
    for layer, logits_TE in (("layers.0", x_TE), ("layers.1", -x_TE)):
        weights_TE, selected_TK = keep_best(logits_TE, 2)
        routing = Routing(weights_TE, logits_TE.softmax(-1), logits_TE, selected_TK)
        records.append(RoutingRecord(layer, routing, mask_T, **task_types))
    options = registry.get(Balance, name)()
    loss = options.build({"layers.0": E, "layers.1": E})
    adapter = SimpleNamespace(config=SimpleNamespace(balance=[options]), balance={name: loss})
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        value, _ = balance_losses(adapter, records)
    value.backward()
    return value.detach(), x_TE.grad


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("name", registry.names(Balance))
def test_mixed_precision_leaves_the_losses_alone(name: str, scale: float) -> None:
    """Also with a router that is as sure as bf16 lets it be: probabilities of 0 and 1."""
    x_TE = (scale * torch.randn(T, E, generator=torch.Generator().manual_seed(0))).bfloat16().float()
    exact, gradient = loss_and_gradient(name, x_TE.double(), mixed=False)
    value, g_TE = loss_and_gradient(name, x_TE, mixed=True)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(g_TE.double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
