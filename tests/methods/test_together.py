"""Parameter products that equal layers make at once, against each layer making its own."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from talklora_pl.adapter import Adapter, AdapterConfig, inject
from talklora_pl.communication.talking import TalkingModule
from talklora_pl.sites.linear import AdaptedLinear
from tests.methods.matrix import ROUTERS, adapted, config_of, randomise
from tests.methods.test_configs import config_of as method
from tests.methods.test_folding import METHODS, outcome
from tests.methods.test_matrix import IDS, MASK
from tests.operators import forward_and_backward

TALKING = config_of("shared_b", "talking", "softmax", dtype="float64")


def layers_of(adapter: Adapter) -> list[AdaptedLinear]:
    return [m for m in adapter.modules() if isinstance(m, AdaptedLinear)]


def compare(config: AdapterConfig) -> int:
    """Made together and by each layer, in float64; for how many layers something was made together."""
    model, adapter = adapted(config)
    model.double().train()
    got = outcome(model, adapter, True)
    made = sum(layer.made is not None for layer in layers_of(adapter))
    adapter.together.on = False
    same(got, outcome(model, adapter, True))
    assert all(layer.made is None for layer in layers_of(adapter))
    return made


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        size = max(1.0, float(value.detach().abs().max()))
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12 * size, msg=name)


@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("graphlora", "mixlora")])
def test_every_method(name: str) -> None:
    options = {**method(name).to_dict(), "targets": ["q_proj", "up_proj"], "dtype": "float64", "allocation": "uniform"}
    if options["plain"]:
        options["plain"] |= {"targets": ["v_proj"]}
    assert compare(AdapterConfig.from_dict(options)) == (6 if options["plain"] else 4)


@pytest.mark.parametrize("per", ["linear", "block"])
@pytest.mark.parametrize("experts", ["lora", "split_lora", "shared_b", "shared_a"])
@pytest.mark.parametrize("communication", ["none", "talking", "gnn", "mlp_mixer"])
def test_combinations(experts: str, communication: str, per: str) -> None:
    for router in ROUTERS:
        config = config_of(experts, communication, router, per, dtype="float64", dropout_input=0.3, alpha=6)
        # embeddings of experts whose features nobody uses are missing in all but the deciding layer of a block
        assert compare(config) == 4, router


class Chain(nn.Module):
    """One adapted Linear after another."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        linears = (nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": linear}) for linear in linears)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["q_proj"](x)
        return x


def operators(name: str, layers: int) -> int:
    model = Chain(layers)
    inject(model, replace(method(name), targets=["q_proj"], dropout_input=0.0))
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    return len(forward_and_backward(model.train(), x, torch.randn(2, 16, 64, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    "name, each, most",
    [
        ("lora", 8, 10),
        ("moelora", 16, 14),
        ("talklora", 16, 30),
        ("talklora_gnn", 36, 25),
        ("talklora_attention", 39, 25),
        ("talklora_mlp_mixer", 44, 25),
    ],
)
def test_operators(name: str, each: int, most: int) -> None:
    """Of every Linear more, its two frozen products among them; and of all of a kind, however many."""
    few, many = operators(name, 4), operators(name, 12)
    assert (many - few) / 8 <= each
    assert few - 4 * each <= most


def in_turn(model: Any, adapter: Adapter, run: Any) -> None:
    """``run`` gives the same with and without what is made together."""
    found = []
    for on in (True, False):
        adapter.together.on = on
        adapter.zero_grad(set_to_none=True)
        run()
        found.append({n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
    same(*found)


def talking() -> tuple[Any, Adapter]:
    model, adapter = adapted(TALKING)
    return model.double().train(), adapter


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant: bool) -> None:
    """Also where another forward pass has begun before, and where a layer runs outside of the model's."""
    model, adapter = talking()
    model.embed.weight.requires_grad_(True)
    plain = [layer.forward for layer in model.layers]
    for layer, forward in zip(model.layers, plain, strict=True):
        layer.forward = lambda x, mask, forward=forward: checkpoint(forward, x, mask, use_reentrant=reentrant)

    def twice() -> None:
        first, second = model(IDS, MASK), model(IDS.flip(1), MASK)
        (first.square().sum() + second.sum()).backward()

    def with_another() -> None:
        model(IDS, MASK).sum().backward()
        x = model.embed(IDS)
        model.layers[0](x, MASK).square().sum().backward()
        with torch.no_grad():
            model(IDS, MASK)
        model(IDS, MASK).square().sum().backward()

    in_turn(model, adapter, twice)
    in_turn(model, adapter, with_another)


def test_a_layer_outside_of_the_model_after_a_step() -> None:
    model, adapter = talking()
    for layer in model.layers:
        layer.forward = lambda x, mask, forward=layer.forward: checkpoint(forward, x, mask, use_reentrant=False)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    model(IDS, MASK).sum().backward()
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.5)
    in_turn(model, adapter, lambda: model.layers[1](x, torch.ones(2, 5)).square().sum().backward())


def test_tensors_that_are_exchanged_or_written_to() -> None:
    model, adapter = talking()
    first = layers_of(adapter)[0]

    def run() -> None:
        model(IDS, MASK).square().sum().backward()

    in_turn(model, adapter, run)
    with torch.no_grad():
        first.experts.A.mul_(2)
    in_turn(model, adapter, run)
    first.experts.A = nn.Parameter(first.experts.A.detach() * 2)
    in_turn(model, adapter, run)


def test_a_layer_without_part_in_the_loss_gets_no_gradient() -> None:
    model, adapter = talking()
    run, model.layers[1].forward = model.layers[1].forward, lambda x, mask: x
    model(IDS, MASK).square().sum().backward()
    for name, p in adapter.layers.named_parameters():
        assert (p.grad is None) == name.startswith("layers.1."), name
    model.layers[1].forward = run
    model(IDS, MASK).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_part_that_somebody_waits_for_is_not_passed_by() -> None:
    model, adapter = talking()
    one = layers_of(adapter)[-1]
    heard: list[Tensor] = []
    one.communication.register_forward_hook(lambda module, args, out: heard.append(out))
    in_turn(model, adapter, lambda: model(IDS, MASK).square().sum().backward())
    assert len(heard) == 2


def test_an_attribute_that_differs_is_not_that_of_another_layer() -> None:
    class Louder(TalkingModule):
        volume = 1.0

        def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
            return self.volume * super().forward(m_TEF, x_TD)

        def fold(self, weight_NEG: Tensor) -> Tensor:
            return self.volume * super().fold(weight_NEG)

    model, adapter = talking()
    for i, layer in enumerate(layers_of(adapter)):
        layer.communication.__class__ = Louder
        layer.communication.volume = float(i)
    in_turn(model, adapter, lambda: model(IDS, MASK).square().sum().backward())
    assert not any(layer.made for layer in layers_of(adapter))


def test_a_part_that_cannot_be_stacked_is_said_once() -> None:
    class Asking(TalkingModule):
        def fold(self, weight_NEG: Tensor) -> Tensor:
            return super().fold(weight_NEG) if float(self.C.sum()) != 0 else weight_NEG

    model, adapter = talking()
    for layer in layers_of(adapter):
        layer.communication.__class__ = Asking
    with pytest.warns(UserWarning) as said:
        got = outcome(model, adapter, True)
    kinds = [w for w in said if "1 layers like it: their parameters are multiplied layer by layer" in str(w.message)]
    assert len(kinds) == 2, [str(w.message) for w in said]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(got, outcome(model, adapter, True))


def test_autocast() -> None:
    """What is made for one dtype is not used for another."""
    model, adapter = adapted(replace(TALKING, dtype="float32"))
    model.train()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(IDS, MASK)
        (y.square().sum() + model(IDS, MASK).sum()).backward()

    found = []
    for on in (True, False):
        adapter.together.on = on
        adapter.zero_grad()
        run()
        found.append(torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]))
        if on:
            assert all(layer.made.matrices.down_MD.dtype == torch.float32 for layer in layers_of(adapter))
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_what_is_of_no_use_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a trainer whose autocast wraps the model's own forward: nothing tells of it when the pass begins."""
    model, adapter = adapted(replace(TALKING, dtype="float32"))
    model.train()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    adapter.together.make = Mock(wraps=adapter.together.make)
    stacked = Mock(wraps=torch.vmap)
    monkeypatch.setattr(torch, "vmap", stacked)
    for _ in range(3):
        model(IDS, MASK).sum().backward()
        assert stacked.call_count == 2  # kinds
    assert adapter.together.make.call_count == 3
    model.train()
    with torch.no_grad():
        model(IDS, MASK)
    model(IDS, MASK)
    assert stacked.call_count == 4


def test_quantised_layers() -> None:
    """Tokens of theirs come in the dtype of the embeddings: their weight has none that says so."""
    model, adapter = talking()
    for layer in model.layers:
        for linear in (layer.attn.q_proj, layer.mlp.up_proj):
            weight = (linear.weight.detach() * 100).round().to(torch.int8)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.frozen_class = type("Int8Linear", (nn.Linear,), {"forward": int8})
    in_turn(model, adapter, lambda: model(IDS, MASK).square().sum().backward())
    adapter.together.on = True
    model(IDS, MASK)
    assert all(layer.made is not None for layer in layers_of(adapter))


def int8(linear: Any, x: Tensor) -> Tensor:
    return x @ linear.weight.to(x.dtype).t() / 100


def test_copies_and_pickles_have_nothing() -> None:
    model, adapter = talking()
    model(IDS, MASK)
    assert layers_of(adapter)[0].made is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.made is None for layer in layers_of(other.talklora["default"]))
        torch.testing.assert_close(other(IDS, MASK), model(IDS, MASK))


def test_evaluation_keeps_its_own() -> None:
    model, adapter = talking()
    model(IDS, MASK)
    model.eval()
    assert all(layer.made is None for layer in layers_of(adapter))
    with torch.no_grad():
        want = model(IDS, MASK)
    torch.testing.assert_close(model(IDS, MASK), want)
    randomise(adapter, 2)
    assert not torch.allclose(model(IDS, MASK), want)
