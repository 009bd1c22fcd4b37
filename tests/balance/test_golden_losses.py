"""Balance losses against the published ones (golden README, sections 1, 3 and 4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from talklora_pl.adapter import Adapter, RoutingCollector
from talklora_pl.balance import BalanceLoss
from talklora_pl.balance.localised import Localised
from talklora_pl.balance.normal import Normal
from talklora_pl.balance.poisson import Poisson
from talklora_pl.balance.switch import Switch
from talklora_pl.routers.top_k import keep_best
from talklora_pl.routing import Routing, RoutingRecord
from tests import golden
from tests.adapter.test_golden_linear import build, ours_and_theirs, theirs


def records_of(probs: list[Tensor], mask_T: Tensor | None = None) -> list[RoutingRecord]:
    """Dense records of one router per numbered layer."""
    if mask_T is None:
        mask_T = torch.ones(len(probs[0]), dtype=torch.bool)
    return [RoutingRecord(f"layers.{l}", Routing(p, p, p.log()), mask_T) for l, p in enumerate(probs)]


def layers_of(probs: list[Tensor]) -> dict[str, int]:
    return {f"layers.{l}": p.shape[-1] for l, p in enumerate(probs)}


@pytest.mark.parametrize("file", golden.cases("gmoe_losses"))
def test_poisson(file: Any) -> None:
    config, tensors = golden.load(file)
    probs = tensors["probs"].clone().requires_grad_()
    loss = Poisson().build(layers_of(list(probs)))
    assert isinstance(loss.rate, torch.nn.Parameter)
    loss.rate.data = tensors["lambda"].clone()
    value = loss(records_of(list(probs)))
    golden.check(config, "poisson", value.reshape(1), tensors["poisson"])
    value.backward()
    golden.check(config, "probs", probs.grad, tensors["poisson_grad.probs"])
    golden.check(config, "lambda", loss.rate.grad, tensors["poisson_grad.lambda"])


@pytest.mark.parametrize("compat, name", [("none", "normal_per_layer"), ("published", "normal_official_global")])
@pytest.mark.parametrize("file", golden.cases("gmoe_losses"))
def test_normal(file: Any, compat: Any, name: str) -> None:
    """All the counts come from the newest micro-step here, so that the gradient reaches them."""
    config, tensors = golden.load(file)
    counts = tensors["counts"].clone().requires_grad_()
    L, n = counts.shape
    loss: Any = Normal(compat=compat).build(layers_of(list(counts)))
    loss.sigma.data = tensors["sigma"].clone()
    loss.count = lambda group: counts[int(group[0].layer.rsplit(".", 1)[-1])]
    value = loss(records_of([torch.full((1, n), 1 / n)] * L))
    golden.check(config, name, value.reshape(1), tensors[name])
    value.backward()
    golden.check(config, "counts", counts.grad, tensors[f"{name}_grad.counts"])
    golden.check(config, "sigma", loss.sigma.grad, tensors[f"{name}_grad.sigma"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("file", golden.cases("mixlora_balance"))
def test_mixtral_form(file: Any, masked: bool) -> None:
    config, tensors = golden.load(file)
    logits = [
        tensors[f"logits.{l}"].clone().requires_grad_() for l in range(sum(k.startswith("logits.") for k in tensors))
    ]
    mask_T = tensors["mask"].flatten().bool() if masked else torch.ones(logits[0].shape[0], dtype=torch.bool)
    records = []
    for l, x in enumerate(logits):
        w_TE, selected_TK = keep_best(x, config["top_k"])
        records.append(RoutingRecord(f"layers.{l}", Routing(w_TE, x.softmax(-1), x, selected_TK), mask_T))
    value = Switch(scope="model", count="per_choice").build(layers_of(logits))(records)
    suffix = "mask" if masked else "no_mask"
    golden.check(config, suffix, value.reshape(1), tensors[f"loss_{suffix}"])
    value.backward()
    for l, x in enumerate(logits):
        golden.check(config, f"{suffix}.{l}", x.grad, tensors[f"grad_{suffix}.logits.{l}"])


def through_the_toy(
    config: dict[str, Any], tensors: dict[str, Tensor], toy: Any, adapter: Adapter, loss: BalanceLoss, **collect: Any
) -> tuple[Tensor, Tensor]:
    """(value, x) of a balance loss over a whole forward pass; checks the gradients of all parameters."""
    x = tensors["x"].clone().requires_grad_()
    with RoutingCollector(toy, **collect) as collector:
        toy(x)
    value = loss(collector.records)
    value.backward()
    return value, x


@pytest.mark.parametrize("file", golden.cases("mola"))
def test_mola(file: Any) -> None:
    config, tensors, toy, adapter = build(file)
    options = Switch(scope="layer", count="share", compat="published")
    loss = options.build(adapter.balanced_layers(options))
    value, x = through_the_toy(config, tensors, toy, adapter, loss)
    golden.check(config, "balance_loss", value.reshape(1), tensors["balance_loss"])
    golden.check(config, "x", x.grad, tensors["balance_grad.x"])
    for name, ours in ours_and_theirs(config, adapter).items():
        grad = torch.zeros_like(ours) if ours.grad is None else ours.grad
        golden.check(config, name, grad, theirs(tensors, f"balance_grad.{name}", ours))


@pytest.mark.parametrize("file", golden.cases("loramoe"))
def test_loramoe(file: Any) -> None:
    config, tensors, toy, adapter = build(file)
    weight = config["blc_weight"]
    loss = Localised(weight=weight, delta=config["blc_alpha"]).build(adapter.routed_layers())
    task_types = torch.tensor(config["task_types"])
    mask = torch.ones(config["batch_seq"])
    with RoutingCollector(toy, mask, task_types) as collector:
        toy(tensors["x"])
    value = weight * loss(collector.records)
    golden.check(config, "balance_loss", value.reshape(1), tensors["balance_loss"])
    value.backward()
    for name, ours in ours_and_theirs(config, adapter).items():
        grad = torch.zeros_like(ours) if ours.grad is None else ours.grad
        golden.check(config, name, grad, theirs(tensors, f"balance_grad.{name}", ours))
