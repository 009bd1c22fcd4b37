"""Sensitivity on routers whose derivative is known, and what a run logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.callbacks.routing_sensitivity import RoutingSensitivity
from talklora_pl.monitoring.sensitivity import (
    DecisionInputs,
    communication_matrices,
    deciding_layers,
    relative_change,
    relative_jacobian,
    routing_weights,
)
from tests.conftest import tiny_llama
from tests.monitoring.test_load_balance import scalars

LAYER = "model.layers.0.self_attn.q_proj"


def layer_of(**options: Any) -> Any:
    """One adapted layer in float64 and eight of its inputs."""
    config = {"rank": 8, "dropout_input": 0.0, "dtype": "float64", "targets": ["q_proj"], **options}
    adapter = inject(tiny_llama().double(), AdapterConfig.from_dict(config))
    return deciding_layers(adapter)[LAYER], torch.randn(8, 32, dtype=torch.float64)


def analytic(layer: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """w = softmax(G x): dw/dx = (diag(w) - w w') G."""
    out = []
    for x, w in zip(x_TD, routing_weights(layer, x_TD).detach(), strict=True):
        jacobian_ED = (torch.diag(w) - torch.outer(w, w)) @ weight_ED
        out.append(jacobian_ED.norm() * x.norm() / w.norm())
    return torch.stack(out)


def test_linear_softmax_router_has_the_analytic_jacobian() -> None:
    layer, x_TD = layer_of(communication="none", router={"name": "softmax", "scores": "x"})
    torch.testing.assert_close(
        relative_jacobian(layer, x_TD), analytic(layer, x_TD, layer.router.scores.weight.detach())
    )


def test_talk_is_part_of_the_derivative() -> None:
    layer, x_TD = layer_of(communication="talking", router={"name": "softmax", "scores": "features"})
    E, R = 4, 2
    # logits = G (C x I_R) A x
    talk = torch.kron(layer.communication.C, torch.eye(R, dtype=torch.float64))
    weight_ED = layer.router.scores.weight @ talk @ layer.experts.A.reshape(E * R, -1)
    torch.testing.assert_close(relative_jacobian(layer, x_TD), analytic(layer, x_TD, weight_ED.detach()))


def test_small_random_changes_agree_with_the_jacobian() -> None:
    layer, x_TD = layer_of(communication="talking", router={"name": "softmax", "scores": "features"})
    squares = [relative_change(layer, x_TD, 1e-6, 1, seed).square() for seed in range(400)]
    rms_T = torch.stack(squares).mean(0).sqrt()
    torch.testing.assert_close(rms_T, relative_jacobian(layer, x_TD) / 32**0.5, rtol=0.2, atol=0)


def test_a_router_that_ignores_its_input_is_not_sensitive() -> None:
    layer, x_TD = layer_of(communication="none", router="uniform")
    assert relative_change(layer, x_TD).abs().max() == 0
    assert relative_jacobian(layer, x_TD).abs().max() == 0


def test_inputs_are_those_of_real_tokens() -> None:
    model = tiny_llama()
    adapter = inject(model, AdapterConfig(rank=8, dropout_input=0.0))
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with DecisionInputs(adapter, mask) as inputs:
        model(input_ids=torch.arange(8).view(2, 4), attention_mask=mask)
    torch.testing.assert_close(inputs.x[LAYER], seen[0][mask.bool()])
    model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    assert len(inputs.x[LAYER]) == 4  # hooks are gone


@pytest.mark.parametrize("communication", ["talking", "attention", "gnn"])
def test_communication_matrices(communication: str) -> None:
    model = tiny_llama()
    adapter = inject(model, AdapterConfig.from_dict({"rank": 8, "dropout_input": 0.0, "communication": communication}))
    mask = torch.ones(2, 4)
    with DecisionInputs(adapter, mask) as inputs:
        model(input_ids=torch.arange(8).view(2, 4), attention_mask=mask)
    matrices = communication_matrices(adapter, inputs.x)
    assert len(matrices) == 10
    if communication == "attention":
        torch.testing.assert_close(matrices[LAYER].sum(-1), torch.ones(4))
    if communication == "talking":
        layer: Any = deciding_layers(adapter)[LAYER]
        torch.testing.assert_close(matrices[LAYER], layer.communication.C.detach())


def test_logged_in_every_evaluation(fit: Callable[..., L.Trainer], tmp_path: Path) -> None:
    fit(RoutingSensitivity(), val_check_interval=2)
    logged = scalars(tmp_path / "run")
    for key in ("change", "jacobian"):
        layers = [v for tag, v in logged.items() if tag.startswith(f"sensitivity_layers/{key}/")]
        assert len(layers) == 10 and all(len(v) == 2 for v in layers)
        last = [v[max(v)] for v in layers]
        assert all(v > 0 for v in last)
        mean = logged[f"sensitivity/{key}"]
        assert mean[max(mean)] == pytest.approx(sum(last) / 10, rel=1e-4)
