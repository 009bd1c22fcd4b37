"""The folded path against the plain one: output, gradients and records, for every method and combination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from talklora_pl.adapter import Adapter, RoutingCollector, inject
from talklora_pl.communication.mlp_mixer import MLPMixerModule
from talklora_pl.communication.talking import TalkingModule
from talklora_pl.sites import folding
from talklora_pl.sites.linear import AdaptedLinear
from talklora_pl.sites.mixture import Mixture
from tests.methods.matrix import ROUTERS, adapted, config_of, randomise, tiny
from tests.methods.test_configs import config_of as method
from tests.methods.test_matrix import IDS, MASK

METHODS = sorted(p.stem for p in (Path(__file__).parents[2] / "configs/method").glob("*.yaml"))


def outcome(model: Any, adapter: Adapter, fold: bool) -> dict[str, Tensor]:
    """Output, gradients of everything trained and of the input, and what a collector sees."""
    for module in adapter.modules():
        if isinstance(module, Mixture):
            module.fold = fold
        if isinstance(module, MLPMixerModule):
            module.as_one = fold
    adapter.zero_grad(set_to_none=True)
    model.embed.weight.requires_grad_(True)
    model.embed.weight.grad = None
    torch.manual_seed(7)  # dropout
    with RoutingCollector(model, MASK) as collector:
        y = model(IDS, MASK)
    loss = y.square().sum()
    for r in collector.records:  # as balance losses do
        loss = loss + (r.routing.logits_TE.square() * r.routing.weights_TE).sum() + r.routing.probs_TE.square().sum()
    loss.backward()
    out = {"y": y, "x.grad": model.embed.weight.grad}
    out |= {f"{n}.grad": p.grad for n, p in adapter.named_parameters() if p.grad is not None}
    for i, r in enumerate(collector.records):
        out |= {f"{i}.{k}": v for k, v in r.routing._asdict().items() if v is not None}
    return out


def compare(config: Any) -> int:
    """Both paths agree in float64; how many Linears have a folded one."""
    model, adapter = adapted(config)
    model.double().train()
    got, want = outcome(model, adapter, True), outcome(model, adapter, False)
    assert got.keys() == want.keys()
    for name, value in want.items():
        # a gradient can be zero but for rounding, as all behind the router of a single expert
        size = max(1.0, float(value.detach().abs().max()))
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12 * size, msg=name)
    linears = [m for m in adapter.modules() if isinstance(m, AdaptedLinear)]
    return sum(m._is_uniform() or m._folds(torch.float64) for m in linears)


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    """With the tensors' dtype of the file, but in float64 and with its own dropout."""
    targets = {"targets": ["mlp"]} if name in ("graphlora", "mixlora") else {"targets": ["q_proj", "up_proj"]}
    options = {**method(name).to_dict(), **targets, "dtype": "float64", "allocation": "uniform"}
    if options["plain"]:
        options["plain"] |= {"targets": ["q_proj"]}
    folded = compare(type(method(name)).from_dict(options))
    nonlinear = ("talklora_attention", "talklora_gnn", "talklora_mlp_mixer")
    assert (folded > 0) == (name not in nonlinear)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("per", ["linear", "block"])
@pytest.mark.parametrize("experts", ["lora", "split_lora", "shared_b", "shared_a"])
@pytest.mark.parametrize("communication", ["none", "talking", "gnn"])
def test_combinations(experts: str, communication: str, per: str, dropout: float) -> None:
    for router in ROUTERS:
        for E in (1, 3):
            options = {"dtype": "float64", "dropout_input": dropout, "dropout_routing": dropout, "alpha": 6}
            folded = compare(config_of(experts, communication, router, per, E=E, **options))
            # of a block's Linears the core folds, whoever decides
            assert (folded > 0) == (per == "block" or (communication != "gnn" and router != "noisy_top_k")), router


@pytest.mark.parametrize("experts", ["lora", "shared_b", "shared_a"])
def test_the_mixer_as_one(experts: str) -> None:
    for router in ("softmax", "noisy_top_k"):
        for see in (False, True):
            compare(config_of(experts, "mlp_mixer", router, dtype="float64", experts_see_talk=see, dropout_input=0.3))


@pytest.mark.parametrize("alpha", [None, 6])
@pytest.mark.parametrize("per", ["linear", "block"])
@pytest.mark.parametrize("communication", ["gnn", "mlp_mixer"])
def test_adapters_of_another_dtype_than_the_base(communication: str, per: str, alpha: int | None) -> None:
    """What is cast, weighed and added at once, against one after the other: float64 adapters on a float32 base."""
    config = config_of("shared_b", communication, "softmax", per, alpha=alpha)
    model, adapter = adapted(config)
    adapter.double()
    model.train()
    got, want = outcome(model, adapter, True), outcome(model, adapter, False)
    assert got.keys() == want.keys()
    for name, value in want.items():
        size = max(1.0, float(value.detach().abs().max()))
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * size, check_dtype=False, msg=name)


def test_unequal_numbers_of_experts_share_b() -> None:
    config = config_of("shared_b", "talking", "softmax", dtype="float64")
    names = ["layers.0.attn.q_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj", "layers.1.mlp.up_proj"]
    model = tiny().double().train()
    adapter = inject(model, config, allocation=dict(zip(names, [4, 2, 3, 5], strict=True)))
    randomise(adapter, 1)
    got, want = outcome(model, adapter, True), outcome(model, adapter, False)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_a_changed_part_does_not_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever derives a communication and changes what it computes need not know of folding."""

    class Doubled(TalkingModule):
        def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
            return 2 * super().forward(m_TEF, x_TD)

    _, adapter = adapted(config_of("shared_b", "talking", "softmax"))
    layer = adapter.layers.get_submodule("layers.0.mlp.up_proj")
    assert folding.offers(layer.communication, "fold")
    monkeypatch.setattr(layer.communication, "__class__", Doubled)
    assert not folding.offers(layer.communication, "fold") and not layer._folds(torch.float32)


def test_a_hook_hears_what_it_waits_for() -> None:
    model, adapter = adapted(config_of("shared_b", "talking", "softmax"))
    layer = adapter.layers.get_submodule("layers.0.mlp.up_proj")
    heard: list[Tensor] = []
    for part in (layer.communication, layer.router, layer.router.scores):
        handle = part.register_forward_hook(lambda module, args, out: heard.append(out))
        model(IDS, MASK)
        handle.remove()
    assert len(heard) == 3
    model(IDS, MASK)
    assert len(heard) == 3


def test_a_choice_is_not_made_from_bfloat16_logits() -> None:
    for router in ROUTERS:
        _, adapter = adapted(config_of("lora", "none", router))
        layer = adapter.layers.get_submodule("layers.0.mlp.up_proj")
        dense = router in ("softmax", "softmax_hot", "team")
        assert layer._folds(torch.bfloat16) == dense
