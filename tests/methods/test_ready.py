"""What layers know from one token to the next, against layers that ask every time; and every change is noticed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talklora_pl.adapter import RoutingCollector, disable_adapter, inject, set_adapter
from talklora_pl.adapter.adapters import adapter_rows
from talklora_pl.sites.linear import AdaptedLinear
from talklora_pl.sites.ready import ReadyLayer
from tests.methods.matrix import config_of, randomise, tiny
from tests.methods.test_matrix import IDS, MASK


def made(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny().to(dtype)
    randomise(inject(model, config), 1)
    return model.eval()


def layer_of(model: Any) -> AdaptedLinear:
    return model.talklora["default"].layers.get_submodule("layers.0.mlp.up_proj")


@torch.no_grad()
def asking(model: Any) -> Tensor:
    """The output of layers that ask every time."""
    get = ReadyLayer.get
    ReadyLayer.get = lambda *args: None  # type: ignore[method-assign]
    try:
        return model(IDS, MASK)
    finally:
        ReadyLayer.get = get  # type: ignore[method-assign]


@torch.no_grad()
def compare(model: Any) -> Tensor:
    got, want = model(IDS, MASK), asking(model)
    assert torch.equal(got, want)
    return got


@pytest.mark.parametrize(
    ("experts", "per", "dtype"),
    [
        ("shared_b", "linear", torch.bfloat16),
        ("lora", "linear", torch.float32),
        ("shared_a", "block", torch.float32),
        ("split_lora", "block", torch.bfloat16),
        ("split_lora", "linear", torch.float64),
    ],
)
def test_every_way(experts: str, per: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is asked, for few tokens and for many."""
    asked: list[int] = []
    way = AdaptedLinear.way
    for communication, router in [
        ("none", "softmax"),
        ("talking", "top_k"),
        ("talking", "softmax"),
        ("gnn", "softmax"),
    ]:
        model = made(config_of(experts, communication, router, per), dtype)
        with torch.no_grad(), monkeypatch.context() as m:
            first = [model(IDS.repeat(n, 1), MASK.repeat(n, 1)) for n in (1, 9)]
            m.setattr(AdaptedLinear, "way", lambda self, dtype: asked.append(1) or way(self, dtype))
            again = [model(IDS.repeat(n, 1), MASK.repeat(n, 1)) for n in (1, 9)]
            assert not asked
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        compare(model)
        found = layer_of(model).ready.found.values()
        folded = communication != "gnn" and per == "linear"
        assert any(ready.parts for ready in found) == folded, communication


def _exchange(layer: AdaptedLinear) -> None:
    layer.router.scores.weight = nn.Parameter(torch.randn_like(layer.router.scores.weight))


CHANGES: dict[str, Callable[[Any, AdaptedLinear, Any], Any]] = {
    "written in place": lambda model, layer, frozen: next(layer.parameters()).mul_(2),
    "moved": lambda model, layer, frozen: setattr(p := next(layer.parameters()), "data", p.data * 2),
    "exchanged": lambda model, layer, frozen: _exchange(layer),
    "loaded": lambda model, layer, frozen: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "unfolded": lambda model, layer, frozen: setattr(layer, "fold", False),
    "an option": lambda model, layer, frozen: setattr(layer.router.scores, "temperature", 3.0),
    "a method": lambda model, layer, frozen: setattr(layer.communication, "forward", lambda m_TEF, x_TD: 2 * m_TEF),
    "frozen, written": lambda model, layer, frozen: frozen.weight.mul_(2),
    "frozen, moved": lambda model, layer, frozen: setattr(frozen.weight, "data", frozen.weight.data * 2),
    "frozen, exchanged": lambda model, layer, frozen: setattr(frozen, "weight", nn.Parameter(frozen.weight * 2)),
    "frozen, a bias": lambda model, layer, frozen: setattr(frozen, "bias", nn.Parameter(torch.ones(12))),
    "frozen, a method": lambda model, layer, frozen: setattr(
        frozen, "forward", lambda x: x.new_ones(*x.shape[:-1], 12)
    ),
    "frozen, a hook": lambda model, layer, frozen: frozen.register_forward_hook(lambda m, args, y: 2 * y),
    "frozen, a hook before": lambda model, layer, frozen: frozen.register_forward_pre_hook(
        lambda m, args: (args[0] * 2,)
    ),
    "a hook on scores": lambda model, layer, frozen: layer.router.scores.register_forward_hook(
        lambda m, args, y: 2 * y
    ),
    "a hook on talk": lambda model, layer, frozen: layer.communication.register_forward_hook(lambda m, args, y: 2 * y),
    "a hook on experts": lambda model, layer, frozen: layer.experts.register_forward_hook(lambda m, args, y: 2 * y),
    "a hook on the layer": lambda model, layer, frozen: layer.register_forward_hook(lambda m, args, y: 2 * y),
    "all in float64": lambda model, layer, frozen: model.double(),
    "training": lambda model, layer, frozen: model.train(),
    "there and back": lambda model, layer, frozen: (model.double(), model.float()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what: str) -> None:
    model = made(config_of("shared_b", "talking", "softmax"))
    layer, frozen = layer_of(model), model.layers[0].mlp.up_proj
    with torch.no_grad():
        before = compare(model)
        assert layer.ready is not None and layer.ready.found
        CHANGES[what](model, layer, frozen)
        after = compare(model)
    same = {"there and back", "training", "unfolded", "all in float64", "a hook on experts"}
    if what in same:
        torch.testing.assert_close(after, before, check_dtype=False)
    else:
        assert not torch.allclose(after, before)


def test_a_hook_hears_and_a_collector_collects() -> None:
    model = made(config_of("shared_b", "talking", "softmax"))
    layer, heard = layer_of(model), []
    compare(model)
    handle = layer.router.register_forward_hook(lambda module, args, out: heard.append(1))
    compare(model)
    handle.remove()
    assert len(heard) == 2
    compare(model)
    with RoutingCollector(model, MASK) as collector:
        compare(model)
    assert len(heard) == 2 and len(collector.records) == 8


def test_adapters_are_switched() -> None:
    config = config_of("shared_b", "talking", "softmax")
    model = made(config)
    randomise(inject(model, config, name="other"), 2)
    model.eval()
    outs = []
    for name in ("default", "other", "default"):
        set_adapter(model, name)
        outs.append(compare(model))
        with disable_adapter(model):
            base = compare(model)
    assert torch.equal(outs[0], outs[2]) and not torch.allclose(outs[0], outs[1])
    rows = ["default", "other", None]
    ids, mask = IDS[:1].repeat(3, 1), MASK[:1].repeat(3, 1)
    with torch.no_grad(), adapter_rows(model, rows):
        each = model(ids, mask)
    for row, want in zip(each, (outs[0], outs[1], base), strict=True):
        torch.testing.assert_close(row, want[0])


def test_gradients_autocast_and_layers_by_themselves() -> None:
    model = made(config_of("shared_b", "talking", "softmax"))
    compare(model)
    layer, x = layer_of(model), torch.randn(3, 8)
    model(IDS, MASK).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        compare(model)
    with torch.inference_mode():
        compare(model)
    compare(model)
    with torch.no_grad():  # outside of a forward pass of the model nobody has looked
        frozen = model.layers[0].mlp.up_proj
        before = frozen(x)
        next(layer.parameters()).mul_(2)
        assert not torch.allclose(frozen(x), before)


def test_a_pass_that_fails_is_over() -> None:
    model = made(config_of("shared_b", "talking", "softmax"))
    compare(model)
    with torch.no_grad(), pytest.raises(IndexError):
        model(IDS + 100, MASK)
    assert not model.talklora["default"].ready.under_way
    compare(model)


def test_copies_and_threads() -> None:
    model = made(config_of("shared_b", "talking", "softmax"))
    compare(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert layer_of(other).ready is None
        want = compare(model)
        assert torch.equal(compare(other), want)
        with torch.no_grad():
            next(layer_of(other).parameters()).mul_(1.5)
        assert not torch.allclose(compare(other), want) and torch.equal(compare(model), want)

    def run(_: int) -> Tensor:
        with torch.no_grad():
            return model(IDS, MASK)

    with ThreadPoolExecutor(3) as threads:
        assert all(torch.equal(y, want) for y in threads.map(run, range(30)))
    assert not model.talklora["default"].ready.under_way


def test_a_part_that_keeps_what_it_has_seen() -> None:
    model = made(config_of("shared_b", "attention", "softmax"))
    layer = layer_of(model)
    forward = type(layer.communication).forward

    class Keeping(type(layer.communication)):  # type: ignore[misc]
        def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
            self.seen = m_TEF.clone()
            return forward(self, m_TEF, x_TD)

    layer.communication.__class__ = Keeping
    for _ in range(3):
        compare(model)
        assert layer.communication.seen.shape[0] == IDS.numel()
