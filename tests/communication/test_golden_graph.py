"""GraphLoRA's graph router of one layer against the published one (golden README, section 2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from talklora_pl.balance.normal import Normal
from talklora_pl.balance.poisson import Poisson
from talklora_pl.communication import graphs
from talklora_pl.communication.gnn import GNN
from talklora_pl.routers.top_k import TopK
from talklora_pl.routing import Routing, RoutingRecord
from talklora_pl.spec import LayerSpec
from tests import golden


def build(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, Any, dict[str, Tensor]]:
    """(communication, router, our trained tensors by golden name) with the golden values."""
    n, d = config["n"], config["d_model"]
    spec = LayerSpec(
        "layers.0.mlp",
        "mlp",
        0,
        d,
        d,
        n,
        n,
        rank=2,
        communicates=True,
        uses_features=False,
        dtype=getattr(torch, config["dtype"]),
    )
    options = GNN(
        nodes="embeddings",
        graph="similarity",
        density=config["beta"],
        rounds=config["R"],
        residual=False,
        activation=config["phi"],
        width=config["g"],
        compat="published",
    )
    graph: Any = options.build(spec, 4)
    router: Any = TopK("per_expert", init="glorot", k=config["top_k"]).build(spec, graph.features)
    ours = {"W_s": graph.W_s, "W_x": graph.W_x, "w_p": router.scores.weight}
    ours |= {f"W_gcn.{k}": W for k, W in enumerate(graph.rounds)}
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(tensors[name])
        graph.X.copy_(tensors["X"])
        graph.edges.copy_(tensors["adjacency"])
    return graph, router, ours


def route(graph: Any, router: Any, x: Tensor) -> Routing:
    x_TD = x.flatten(0, -2)
    nothing = x_TD.new_zeros(len(x_TD), graph.X.shape[0], 0)
    return router(x_TD, graph(nothing, x_TD))


@pytest.mark.parametrize("file", golden.cases("gmoe_router"))
def test_graph_is_built_as_published(file: Any) -> None:
    config, tensors = golden.load(file)
    v = silu(linear(tensors["X"], tensors["W_s"]))
    assert torch.equal(graphs.similar_published(v, config["beta"]).long(), tensors["adjacency"])


@pytest.mark.parametrize("file", golden.cases("gmoe_router"))
def test_routing(file: Any) -> None:
    config, tensors = golden.load(file)
    graph, router, _ = build(config, tensors)
    r = route(graph, router, tensors["x"])
    golden.check(config, "logits", r.logits_TE, tensors["logits"])
    golden.check(config, "probs", r.probs_TE, tensors["probs"])
    golden.check(config, "combine", r.weights_TE, tensors["combine"])
    assert r.selected_TK is not None and torch.equal(r.selected_TK, tensors["topk_index"])
    golden.check(config, "topk_weight", r.weights_TE.gather(1, r.selected_TK), tensors["topk_weight"])


@pytest.mark.parametrize("scalar", ["logits", "combine", "layer", "aux"])
@pytest.mark.parametrize("file", golden.cases("gmoe_router"))
def test_gradients(file: Any, scalar: str) -> None:
    config, tensors = golden.load(file)
    graph, router, ours = build(config, tensors)
    x = tensors["x"].clone().requires_grad_()
    r = route(graph, router, x)
    ours = {**ours, "x": x}
    if scalar == "logits":
        loss = (r.logits_TE * tensors["cot_logits"]).sum()
    elif scalar == "combine":
        loss = (r.weights_TE * tensors["cot_combine"]).sum()
    elif scalar == "layer":
        out = torch.einsum("te,td,eod->to", r.weights_TE, x.flatten(0, -2), tensors["expert_W"]).view_as(x)
        golden.check(config, "layer_out", out, tensors["layer_out"])
        loss = (out * tensors["cot_out"]).sum()
    else:
        layers = {"layers.0.mlp": config["n"]}
        poisson: Any = Poisson().build(layers)
        normal: Any = Normal().build(layers)
        poisson.rate.data, normal.sigma.data = tensors["lambda"].clone(), tensors["sigma"].clone()
        normal.counts = tensors["count_before"].clone()
        records = [RoutingRecord("layers.0.mlp", r, torch.ones(r.probs_TE.shape[0], dtype=torch.bool))]
        loss = config["c_poisson"] * poisson(records) + config["c_normal"] * normal(records)
        golden.check(config, "count_after", normal.counts, tensors["count_after"])
        ours |= {"lambda": poisson.rate, "sigma": normal.sigma}
    golden.check(config, "loss", loss.reshape(1), tensors[f"loss_{scalar}"])
    loss.backward()
    for name, p in ours.items():
        want = tensors[f"grad_{scalar}.{name}"]
        golden.check(config, name, torch.zeros_like(p) if p.grad is None else p.grad, want)
