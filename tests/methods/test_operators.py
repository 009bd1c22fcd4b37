"""How many operators an adapted Linear costs, forward and backward: bf16 base, float32 adapters, 3-D input."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talklora_pl.adapter import inject
from talklora_pl.sites.dropped import drop, dropped
from talklora_pl.sites.fused import frozen_and_down
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


def check_dropout(method: str, operators: int, most: int, request: pytest.FixtureRequest) -> None:
    """``most`` more where dropout has a kernel of its own; a CPU has several that together are faster."""
    assert count(method, dropout=0.05) <= operators + most + 4
    request.getfixturevalue("plain_dropout")
    assert count(method, dropout=0.05) <= operators + most


def test_counter() -> None:
    model = One().requires_grad_(False)
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    assert forward_and_backward(model, x, torch.ones(2, 16, 48, dtype=torch.bfloat16)) == ["mm.default"] * 2


@pytest.mark.parametrize("method, most", [("lora", 12), ("talklora", 31), ("talklora_no_talk", 26), ("moelora", 21)])
def test_linear_methods(method: str, most: int, request: pytest.FixtureRequest) -> None:
    n = count(method)
    assert n <= most
    # with dropout, scores that come from x itself are a product of their own
    check_dropout(method, n, 8 if method == "moelora" else 4, request)


@pytest.mark.parametrize("method, most", [("talklora_gnn", 41), ("talklora_attention", 44), ("talklora_mlp_mixer", 49)])
def test_communication(method: str, most: int, request: pytest.FixtureRequest) -> None:
    n = count(method)
    assert n <= most and n <= 1.6 * count("talklora")
    check_dropout(method, n, 4, request)


class Three(nn.Module):
    """Linears that have their input in common."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(512, 512, bias=False, dtype=torch.bfloat16) for _ in "qkv")

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


def kept_bytes(model: nn.Module) -> int:
    """What a forward pass keeps for the backward pass, every storage once; parameters are there anyway."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    x = torch.randn(2, 512, 512, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model.train()(x)  # held, as what it holds is counted
    assert y.requires_grad
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


def three(method: str, dropout: float) -> Three:
    model = Three()
    inject(model, replace(config_of(method), targets=["q_proj", "k_proj", "v_proj"], dropout_input=dropout))
    return model


@pytest.mark.parametrize("method", ["lora", "talklora"])
def test_dropout_keeps_a_byte_per_number(method: str) -> None:
    assert kept_bytes(three(method, 0.05)) - kept_bytes(three(method, 0.0)) == 3 * 2 * 512 * 512


def print_bytes_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=32, lora_dropout=0.05, target_modules=["q_proj", "k_proj", "v_proj"])
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            print(kept_bytes(get_peft_model(Three(), options)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_dropout_keeps_no_more_than_peft() -> None:
    """In a process of its own: PEFT imports what other tests must not find."""
    pytest.importorskip("peft")
    code = "from tests.methods.test_operators import print_bytes_of_peft as run; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    theirs = [int(line) for line in done.stdout.split()]
    for method in ("lora", "talklora", "moelora"):
        for autocast, most in zip((False, True), theirs, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                assert kept_bytes(three(method, 0.05)) <= 1.05 * most


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_is_that_of_a_plain_product(dtype: torch.dtype) -> None:
    """Same seed, same mask, same gradients as the masked input times A."""
    torch.manual_seed(0)
    x_TD, A_PD = torch.randn(40, 64, dtype=dtype), torch.randn(8, 64, dtype=dtype)
    layer = nn.Linear(64, 16, bias=False, dtype=dtype).requires_grad_(False)
    layer.frozen_class = nn.Linear
    results = []
    for fast in (True, False):
        x, A = x_TD.clone().requires_grad_(), A_PD.clone().requires_grad_()
        torch.manual_seed(3)
        if fast:
            y, h = frozen_and_down(layer, layer, x, 0.25, A)
        else:
            y, h = layer(x), nn.functional.linear(x * drop(x.detach(), 0.25)[1] / 0.75, A)
        (y.sum() + h.square().sum()).backward()
        results.append((y, h, x.grad, A.grad))
    for got, want in zip(*results, strict=True):
        rounding = torch.finfo(dtype).eps * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=2 * rounding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0005, 0.05, 0.5])
def test_dropout_drops_each_number_by_itself(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(1001, 999, dtype=dtype)
    left_TD, mask_TD = drop(x_TD, p)
    assert torch.equal(left_TD, dropped(x_TD, mask_TD, 1 / (1 - p)))
    assert torch.equal(left_TD, torch.ops.aten.native_dropout_backward(x_TD, mask_TD, 1 / (1 - p)))
    gone_N = (~mask_TD).double().flatten()
    few = 5 / gone_N.numel()
    assert gone_N.mean().item() == pytest.approx(p, abs=5 * (p / gone_N.numel()) ** 0.5)
    for k in range(1, 9):  # numbers that come from one draw are as independent as others
        assert (gone_N[k:] * gone_N[:-k]).mean().item() == pytest.approx(p * p, abs=5 * p / gone_N.numel() ** 0.5 + few)
