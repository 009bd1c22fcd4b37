"""What must hold for every combination of experts, communication and router (contract, properties)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from talklora_pl.adapter import RoutingCollector, RoutingRecord, disable_adapter
from talklora_pl.adapter.io import load_adapter, save_adapter
from talklora_pl.balance import Balance
from talklora_pl.communication import Communication
from talklora_pl.experts import Experts
from talklora_pl.registry import names
from talklora_pl.routers import Router
from tests.methods.matrix import (
    COMMUNICATIONS,
    EXPERTS,
    MATRIX,
    ROUTERS,
    adapted,
    config_of,
    permute_experts,
    randomise,
    tiny,
)

IDS = torch.tensor([[1, 5, 2, 9, 7], [3, 3, 8, 0, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
REAL = MASK.bool()


def run(model: Any, ids: Tensor = IDS, mask: Tensor = MASK) -> tuple[Tensor, list[RoutingRecord]]:
    with RoutingCollector(model, mask) as collector:
        return model(ids, mask), collector.records


def margin(model: Any, records: list[RoutingRecord]) -> Tensor:
    """(T,) how far every token is from another selection, at least over all records."""
    out = torch.full_like(records[0].routing.logits_TE[:, 0], torch.inf)
    for r in records:
        if (chosen_TK := r.routing.selected_TK) is not None and chosen_TK.shape[1] < r.routing.logits_TE.shape[1]:
            router = model.talklora["default"].layers.get_submodule(r.layer).router
            score_TE = r.routing.logits_TE
            if hasattr(router, "bias"):
                score_TE = router.activation(score_TE) + router.bias
            best = score_TE.sort(descending=True).values
            out = torch.minimum(out, best[:, chosen_TK.shape[1] - 1] - best[:, chosen_TK.shape[1]])
    return out.detach()


def test_the_matrix_has_every_part() -> None:
    assert set(names(Experts)) == set(EXPERTS)
    assert set(names(Communication)) == {c["name"] for c in COMMUNICATIONS.values()}
    assert set(names(Router)) - {"uniform"} == {r["name"] for r in ROUTERS.values()}


@pytest.mark.parametrize("experts, communication, router", MATRIX)
def test_combination(experts: str, communication: str, router: str, tmp_path: Any) -> None:
    config = config_of(experts, communication, router)
    model, adapter = adapted(config, values=None)
    with disable_adapter(model):
        base = model(IDS, MASK)
    torch.testing.assert_close(model(IDS, MASK), base, msg="a fresh adapter changes nothing")

    randomise(adapter, 1)
    y, before = run(model)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for r in before:
        torch.testing.assert_close(r.routing.weights_TE.sum(-1), torch.ones(10), msg="weights sum to 1")
        torch.testing.assert_close(r.routing.probs_TE.sum(-1), torch.ones(10))

    z, after = run(model, torch.where(REAL, IDS, (IDS + 4) % 11))
    torch.testing.assert_close(z[REAL], y[REAL], **close, msg="pads change no output")
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a.weight_share(), b.weight_share(), **close, msg="pads are no load")
        torch.testing.assert_close(a.selection_share(), b.selection_share(), msg="pads are no load")

    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(5))
    site = model.layers[0].mlp if experts == "ffn_lora" else model.layers[0].mlp.up_proj
    with RoutingCollector(model) as together:
        site(x)
    with RoutingCollector(model) as alone:
        for t in range(6):
            site(x[:, t : t + 1])
    weights = torch.cat([r.routing.weights_TE for r in alone.records])
    torch.testing.assert_close(weights, together.records[0].routing.weights_TE, **close, msg="tokens decide alone")

    save_adapter(model, tmp_path)
    again = tiny()
    loaded = load_adapter(again, tmp_path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in adapter.state_dict().items())
    # where tensors lie in memory decides the order of sums
    torch.testing.assert_close(again(IDS, MASK), y, rtol=1e-5, atol=1e-6, msg="save and load")

    model.train()
    run(model)[0].square().sum().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.eval()

    assert margin(model, before).min() > 1e-5, "the next check needs a clear choice"
    order = torch.tensor([2, 0, 3, 1])
    permute_experts(adapter, order)
    z, after = run(model)
    torch.testing.assert_close(z, y, **close, msg="permuted experts give the same output")
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a.routing.weights_TE, b.routing.weights_TE[:, order], **close)


@pytest.mark.parametrize("experts, communication, router", MATRIX)
def test_bf16_base_agrees(experts: str, communication: str, router: str) -> None:
    """fp32 adapters on a bf16 base, for tokens that are not near a tie."""
    model, _ = adapted(config_of(experts, communication, router))
    mlp = model.layers[0].mlp
    x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    with RoutingCollector(model) as collector:
        y = mlp(x)
    clear = margin(model, collector.records) > 0.02 * collector.records[0].routing.logits_TE.std()
    z = mlp.bfloat16()(x.bfloat16()).float()
    assert clear.sum() > 5
    assert (z - y)[0, clear].abs().max() / y.abs().max() < 2e-2


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("experts", [e for e in EXPERTS if e != "ffn_lora"])
def test_one_expert_is_lora(experts: str, communication: str) -> None:
    """Whatever it says to itself and whoever routes it: y = W x + B A x, with the core folded into A."""
    model, adapter = adapted(config_of(experts, communication, "softmax", E=1))
    y = model(IDS, MASK)
    plain = tiny()
    with torch.no_grad():
        for name in adapter.experts_per_layer:
            e = adapter.layers.get_submodule(name).experts
            A = e.A.reshape(-1, e.A.shape[-1])
            if experts == "shared_b":
                A = e.core[0] @ A
            plain.get_submodule(name).weight += (e.up().t() @ A) * adapter.config.scale()
    torch.testing.assert_close(y, plain(IDS, MASK), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_any_size(data: st.DataObject) -> None:
    """Sizes at random: gradients everywhere, weights that sum to 1, permutation, talked features of the right width."""
    draw = lambda values: data.draw(st.sampled_from(list(values)))  # noqa: E731
    E, R = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([2, 4, 6]))
    communication, router = draw(COMMUNICATIONS), draw(ROUTERS)
    config = config_of(draw(EXPERTS), communication, router, draw(["linear", "block"]), E, R)
    model, adapter = adapted(config, values=data.draw(st.integers(0, 9)))
    y, records = run(model)
    for r in records:
        torch.testing.assert_close(r.routing.weights_TE.sum(-1), torch.ones(10))
    y.square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    # experts that a graph without residuals cannot tell apart tie exactly
    assume(margin(model, records).min() > 1e-4)
    with torch.no_grad():
        permute_experts(adapter, torch.tensor(data.draw(st.permutations(range(E)))))
        torch.testing.assert_close(model(IDS, MASK), y.detach(), rtol=1e-3, atol=1e-4)


def test_all_losses_together(experts: str = "lora") -> None:
    balance = [{"name": n} for n in names(Balance)]
    model, adapter = adapted(config_of(experts, "talking", "top_k", balance=balance), values=None)
    randomise(adapter.layers, 1)
    model.train()
    _, records = run(model)
    total = sum(b.weight * adapter.balance[b.name](records) for b in adapter.config.balance)
    assert isinstance(total, Tensor)
    total.backward()
    reached = {n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"balance.poisson.rate", "balance.normal.sigma"} <= reached
    assert any(".communication.C" in n for n in reached) and any(".router." in n for n in reached)
