"""Without gradients a layer's matrices are folded and cast once; whatever changes a trained tensor is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talklora_pl.adapter import inject
from talklora_pl.adapter.io import load_adapter, save_adapter
from talklora_pl.sites import fused
from talklora_pl.sites.linear import AdaptedLinear
from tests.methods.matrix import ROUTERS, adapted, config_of, randomise, tiny
from tests.methods.test_configs import config_of as method_file
from tests.methods.test_matrix import IDS, MASK
from tests.operators import Operators


def fresh(model: Any) -> Tensor:
    """The output when nothing is kept."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module._kept.forget()
    with torch.no_grad():
        return model(IDS, MASK)


def with_sgd(model: Any, adapter: nn.Module) -> None:
    model.train()
    model(IDS, MASK).square().sum().backward()
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    model.eval()


def with_sgd_in_eval(model: Any, adapter: nn.Module) -> None:
    model(IDS, MASK).square().sum().backward()
    torch.optim.AdamW(adapter.parameters(), lr=0.1, foreach=True).step()


def exchange(model: Any, adapter: nn.Module) -> None:
    experts = adapter.layers.get_submodule("layers.0.mlp.up_proj").experts
    experts.A = nn.Parameter(experts.A.detach() + 1)


CHANGES: dict[str, Callable[[Any, nn.Module], Any]] = {
    "training": with_sgd,
    "a step in eval mode": with_sgd_in_eval,
    "in place": lambda model, adapter: randomise(adapter, 5),
    "a state dict": lambda model, adapter: adapter.load_state_dict({k: v + 1 for k, v in adapter.state_dict().items()}),
    "an assigned state dict": lambda model, adapter: adapter.load_state_dict(
        {k: v + 1 for k, v in adapter.state_dict().items()}, assign=True
    ),
    "a new parameter": exchange,
    "another dtype": lambda model, adapter: model.double(),
    "and back": lambda model, adapter: (randomise(adapter, 6), model.half().float()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("communication", ["talking", "gnn"])
def test_a_change_is_noticed(change: str, communication: str) -> None:
    model, adapter = adapted(config_of("shared_b", communication, "softmax"))
    with torch.no_grad():
        before = model(IDS, MASK)
    with torch.no_grad():
        assert torch.equal(model(IDS, MASK), before)
    CHANGES[change](model, adapter)
    with torch.no_grad():
        after = model(IDS, MASK)
    assert torch.equal(after, fresh(model)) and not torch.equal(after.float(), before)


@pytest.mark.parametrize("per", ["linear", "block"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", ["lora", "shared_a", "shared_b"])
def test_equals_a_pass_with_gradients(experts: str, router: str, per: str) -> None:
    model, _ = adapted(config_of(experts, "talking", router, per, alpha=6))
    want = model(IDS, MASK)
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with context():
            for _ in range(2):
                torch.testing.assert_close(model(IDS, MASK), want)


def test_a_copy_keeps_its_own(tmp_path: Any) -> None:
    model, adapter = adapted(config_of("shared_b", "talking", "softmax"))
    with torch.no_grad():
        before = model(IDS, MASK)
        other = copy.deepcopy(model)
        randomise(adapter, 9)
        assert torch.equal(other(IDS, MASK), before) and not torch.equal(model(IDS, MASK), before)
        save_adapter(model, tmp_path)
        again = tiny()
        load_adapter(again, tmp_path)
        torch.testing.assert_close(again(IDS, MASK), model(IDS, MASK))


@pytest.mark.parametrize("method, more", [("talklora", 5), ("lora", 2), ("talklora_gnn", 14)])
def test_operators_of_a_step_of_generation(method: str, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the one of the bfloat16 Linear itself: down product, logits, softmax, weights and up product."""
    monkeypatch.setattr(fused, "FEW", 0)  # as on a GPU
    model = tiny()
    inject(model, replace(method_file(method), targets=["up_proj"]))
    linear = model.eval().layers[0].mlp.up_proj.bfloat16()
    x = torch.randn(1, 1, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        linear(x)
        with Operators() as operators:
            linear(x)
    assert len(operators.names) == 1 + more


@pytest.mark.parametrize("per", ["linear", "block"])
@pytest.mark.parametrize("router", ["softmax", "top_k", "noisy_top_k"])
def test_few_tokens_on_a_cpu_are_computed_in_float32(router: str, per: str) -> None:
    """Nearer to float64 than the many tokens of a prompt, and kept beside what these need."""
    model, adapter = adapted(config_of("shared_b", "talking", router, per, alpha=6))
    want_model = copy.deepcopy(model).double()
    linear, want_linear = (m.eval().layers[0].mlp.up_proj for m in (model, want_model))
    torch.manual_seed(0)
    x_TD = torch.randn(fused.FEW + 1, 8, dtype=torch.bfloat16)
    linear.bfloat16()
    want_linear.weight = nn.Parameter(linear.weight.double())

    def run(linear: Any, x: Tensor) -> Tensor:
        # a block decides from its own input
        block = model.layers[0].mlp if linear is not want_linear else want_model.layers[0].mlp
        layer = block.talklora_adapters.layers["default"] if per == "block" else None
        with torch.no_grad(), layer.decided(x) if layer else nullcontext():
            return linear(x)

    many, few, want = run(linear, x_TD), run(linear, x_TD[:-1]), run(want_linear, x_TD.double())
    again = run(linear, x_TD)
    assert torch.equal(many, again) and few.dtype == torch.bfloat16
    error = ((few - want[:-1]).abs().max() / want.abs().max()).item()
    assert error <= torch.finfo(torch.bfloat16).eps
    if per == "linear":
        kept = adapter.layers.get_submodule("layers.0.mlp.up_proj")._kept
        assert len(kept._values) == 2
        randomise(adapter, 3)
        assert not torch.equal(run(linear, x_TD[:-1]), few) and len(kept._values) == 1
