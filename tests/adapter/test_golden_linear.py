"""Adapted Linears against the published layers: outputs, routing and all gradients (golden README, section 1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talklora_pl.adapter import Adapter, AdapterConfig, RoutingCollector, inject
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.communication.talking import Talking
from talklora_pl.experts.lora import LoRA, SplitLoRA
from talklora_pl.experts.shared_a import SharedA
from talklora_pl.experts.shared_b import SharedB
from talklora_pl.routers.softmax import Softmax
from talklora_pl.routers.team import Team
from talklora_pl.routers.top_k import TopK
from tests import golden


class Toy(nn.Module):
    """h <- h + down(concat of parallel Linears of h), as the numbers were recorded."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.types = [t for t, _ in config["parallel"]]
        self.layers = nn.ModuleList()
        for l in range(config["L"]):
            layer = nn.Module()
            for t in [*self.types, "down"]:
                W = tensors[f"W0.{l}.{t}"]
                linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
                linear.weight.data.copy_(W)
                layer.add_module(t, linear)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen = {}
        for l, layer in enumerate(self.layers):
            outs = []
            for t in self.types:
                outs.append(layer.get_submodule(t)(x))
                seen[f"{l}.{t}"] = outs[-1]
            down = layer.down(torch.cat(outs, -1))
            seen[f"{l}.down"] = down
            x = x + down
        return x, seen


PARTS: dict[str, dict[str, Any]] = {
    "talklora": {"experts": SharedB(), "communication": Talking(), "router": Softmax("features")},
    "talklora_notalk": {"experts": SharedB(), "communication": NoCommunication(), "router": Softmax("features")},
    "moelora": {"experts": SplitLoRA(), "communication": NoCommunication(), "router": Softmax("x")},
    "teamlora": {"experts": SplitLoRA(), "communication": NoCommunication(), "router": Team("x")},
    "mola": {"experts": LoRA(), "communication": NoCommunication(), "router": TopK("x")},
    "hydralora": {"experts": SharedA(), "communication": NoCommunication(), "router": Softmax("x")},
    "loramoe": {"experts": LoRA(), "communication": NoCommunication(), "router": Softmax("x")},
}


def build(file: Any) -> tuple[dict[str, Any], dict[str, Tensor], Toy, Adapter]:
    config, tensors = golden.load(file)
    toy = Toy(config, tensors)
    parts = PARTS[config["kind"]]
    splits = parts["experts"].splits_rank
    counts = per_layer(config)
    if "top_k" in config:
        k = config["top_k"]
        parts = {**parts, "router": TopK("x", k={int(n): K for n, K in k.items()} if isinstance(k, dict) else k)}
    adapter = inject(
        toy,
        AdapterConfig(
            targets=[*toy.types, "down"],
            num_experts=max(counts),
            **{"rank" if splits else "expert_rank": config["r"]},
            alpha=config["scale"] * config["r"],
            dropout_input=0.0,
            dtype=config["dtype"],
            **parts,
        ),
        allocation={f"layers.{l}.{t}": n for l, n in enumerate(counts) for t in [*toy.types, "down"]},
    )
    with torch.no_grad():
        for name, ours in ours_and_theirs(config, adapter).items():
            ours.copy_(theirs(tensors, f"param.{name}", ours))
    return config, tensors, toy, adapter


def per_layer(config: dict[str, Any]) -> list[int]:
    """Number of experts of every layer."""
    n = config["n"]
    return n if isinstance(n, list) else [n] * config["L"]


def ours_and_theirs(config: dict[str, Any], adapter: Adapter) -> dict[str, Tensor]:
    """Our parameters by the golden name; ``A.i`` stands for a stack over i."""
    out = {}
    for l, n in enumerate(per_layer(config)):
        for t in [*(t for t, _ in config["parallel"]), "down"]:
            layer = adapter.layers.get_submodule(f"layers.{l}.{t}")
            kind = config["kind"]
            out[f"{l}.{t}.A{'.i' if kind in ('loramoe', 'mola') else ''}"] = layer.experts.A
            if kind.startswith("talklora"):
                out[f"{l}.{t}.E.i"] = layer.experts.core
                out[f"{l}.{t}.G"] = layer.router.scores.weight
                holder = layer.experts.shared[0]
                out[f"shared.{t}.B.i"] = holder.B
                assert holder.B.shape[0] == n
            else:
                out[f"{l}.{t}.B.i"] = layer.experts.B
                out[f"{l}.{t}.R"] = layer.router.scores.weight
            if kind == "teamlora":
                out[f"{l}.{t}.T"] = layer.router.team
            if kind == "talklora":
                out[f"{l}.{t}.C"] = layer.communication.C
    return out


def theirs(tensors: dict[str, Tensor], name: str, ours: Tensor) -> Tensor:
    """The golden tensor ``name`` in our layout: experts stacked in front, B transposed to (E, R, O)."""
    if not name.endswith(".i"):
        return tensors[name].reshape(ours.shape)
    stem = name.removesuffix(".i")
    stack = torch.stack([tensors[f"{stem}.{i}"] for i in range(ours.shape[0])])
    return stack.transpose(1, 2) if stem.endswith(".B") else stack


@pytest.mark.parametrize("file", golden.cases(*PARTS))
def test_toy_forward_and_all_gradients(file: Any) -> None:
    config, tensors, toy, adapter = build(file)
    x = tensors["x"].clone().requires_grad_()
    with RoutingCollector(toy) as collector:
        _, outs = toy(x)
    loss = sum((out * tensors[f"cot.{key}"]).sum() for key, out in outs.items())
    loss.backward()

    golden.check(config, "loss", loss.reshape(1), tensors["loss"])
    golden.check(config, "grad.x", x.grad, tensors["grad.x"])
    for key, out in outs.items():
        golden.check(config, f"out.{key}", out, tensors[f"out.{key}"])
    for r in collector.records:
        name = f"router_logits.{r.layer.removeprefix('layers.')}"
        golden.check(config, name, r.routing.logits_TE, tensors[name].flatten(0, -2))
        if f"topk_index.{r.layer.removeprefix('layers.')}" in tensors:
            name = r.layer.removeprefix("layers.")
            chosen_TK = tensors[f"topk_index.{name}"].flatten(0, -2)
            assert torch.equal(r.routing.selected_TK, chosen_TK)
            golden.check(
                config,
                name,
                r.routing.weights_TE.gather(1, chosen_TK),
                tensors[f"topk_weight.{name}"].flatten(0, -2),
            )
    assert len(collector.records) == len(outs)
    for name, ours in ours_and_theirs(config, adapter).items():
        golden.check(config, f"grad.{name}", ours.grad, theirs(tensors, f"grad.{name}", ours))
    assert all(p.grad is None for n, p in toy.named_parameters() if not n.startswith("talklora."))


@pytest.mark.parametrize("file", golden.cases(*PARTS))
def test_single_layer_pulls_back_as_published(file: Any) -> None:
    config, tensors, toy, adapter = build(file)
    for l in range(config["L"]):
        for t in [*toy.types, "down"]:
            adapter.zero_grad()
            x = tensors[f"in.{l}.{t}"].clone().requires_grad_()
            toy.layers[l].get_submodule(t)(x).backward(tensors[f"grad_out.{l}.{t}"])
            golden.check(config, f"grad_in.{l}.{t}", x.grad, tensors[f"grad_in.{l}.{t}"])
            for name, ours in ours_and_theirs(config, adapter).items():
                if name.startswith(f"{l}.{t}."):
                    golden.check(config, name, ours.grad, theirs(tensors, f"grad.{name}", ours))
                elif name == f"shared.{t}.B.i":
                    golden.check(config, name, ours.grad, theirs(tensors, f"grad_share.{l}.{t}.B.i", ours))


@pytest.mark.parametrize("file", golden.cases("talklora"))
def test_wrong_variants_are_far_away(file: Any) -> None:
    """The numbers can tell: another communication matrix gives other outputs."""
    config, tensors, toy, adapter = build(file)
    with torch.no_grad():
        for name, ours in ours_and_theirs(config, adapter).items():
            if name.endswith(".C"):
                ours.copy_(ours.t().clone())
    _, outs = toy(tensors["x"])
    assert max(golden.difference(out, tensors[f"out.{key}"]) for key, out in outs.items()) > 0.1


@pytest.mark.parametrize("file", golden.cases("talklora"))
def test_ordinary_path_gives_the_same_numbers(file: Any) -> None:
    """A layer with a hook (or a quantised one) is called as it is, and the result added."""
    config, tensors, toy, _ = build(file)
    for m in toy.modules():
        m.register_forward_hook(lambda m, a, out: None)
    x = tensors["x"].clone().requires_grad_()
    _, outs = toy(x)
    sum((out * tensors[f"cot.{key}"]).sum() for key, out in outs.items()).backward()
    golden.check(config, "grad.x", x.grad, tensors["grad.x"])
    for key, out in outs.items():
        golden.check(config, f"out.{key}", out, tensors[f"out.{key}"])
