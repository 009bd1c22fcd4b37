"""Training steps of the models that are compared, as functions without arguments."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import Base, adapted, peft_lora
from talklora_pl.adapter import RoutingCollector
from talklora_pl.captured import CapturedSteps
from talklora_pl.compiled import CompiledLayers
from talklora_pl.distributed.fsdp import decoder_layers
from talklora_pl.inputs import NO_LOSS, labelled, to_device, token_logits
from talklora_pl.pieces import summed_nll


def peers_of(make: Callable[[], Any], targets: list[str] | None = None, causal: bool = True) -> dict[str, Any]:
    if importlib.util.find_spec("peft") is None:
        return {}
    return {name: peft_lora(make(), targets, causal) for name in ("PEFT LoRA", "PEFT LoRA, autocast")}


def floor(base: Base) -> Any:
    model = base.copy()
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


def compiled(base: Base, batch: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Every decoder layer as a graph, ours and the others' alike: layers of one kind share it."""
    model = adapted(base.copy(), "talklora").to(base.device)
    CompiledLayers(model)
    runs = {"talklora, model.compile: layers": step(model, batch, ours=True)}
    others = {"frozen base": floor(base), **peers_of(base.copy)}
    others.pop("PEFT LoRA", None)  # autocast is the faster one, and what transformers' Trainer does
    for name, other in others.items():
        for layer in decoder_layers(other):
            layer.compile(dynamic=True)
        runs[f"{name}, compiled"] = step(other.to(base.device), batch, ours=False, autocast="autocast" in name)
    return runs


def captured(base: Base, batch: dict[str, Any], peers: bool) -> dict[str, Callable[[], Any]]:
    """Forward and backward passes as one CUDA graph, ours and the best of the others alike."""
    runs = {
        "talklora, model.cuda_graph": step(adapted(base.copy(), "talklora").to(base.device), batch, True, graph=True)
    }
    others = peers_of(base.copy) if peers else {}
    if model := others.get("PEFT LoRA, autocast"):
        runs["PEFT LoRA, autocast, cuda_graph"] = step(model.to(base.device), batch, False, autocast=True, graph=True)
    return runs


def between(first: int, last: int, rows: int) -> list[int]:
    return [int(n) for n in torch.linspace(first, last, rows)]


def made_rows(lengths: list[int], base: Base, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, base.vocabulary, (n,), generator=generator).tolist() for n in lengths]
    labels = [[NO_LOSS] * (n - n // 4) + row[n - n // 4 :] for n, row in zip(lengths, ids)]
    return to_device(labelled(ids, labels, 0), device)


def step(
    model: Any, batch: dict[str, Any], ours: bool, autocast: bool = False, graph: bool = False
) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def loss_of(batch: dict[str, Any]) -> tuple[Tensor, None]:
        if ours:
            with RoutingCollector(model, batch["attention_mask"]):
                return summed_nll(model, batch)[0], None
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
            logits_NV, targets_N, _ = token_logits(model, batch)
        return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum"), None

    steps = CapturedSteps(model, loss_of, _fail, plain=0) if graph else None

    def run() -> None:
        loss, _ = loss_of(batch) if steps is None else steps(batch, {})
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def _fail(reason: str) -> None:
    raise RuntimeError(reason)


def forward_and_backward(model: Any, batch: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        summed_nll(model, batch)[0].backward()
        model.zero_grad(set_to_none=True)

    return run
