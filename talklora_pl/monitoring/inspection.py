"""What the experts of an adapter do with given texts: one pass without training.

T tokens, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.adapter import Adapter
from talklora_pl.inputs import model_inputs, to_device
from talklora_pl.monitoring.metrics import Load, RoutingLoad
from talklora_pl.monitoring.sensitivity import DecisionInputs, Sensitivity, communication_matrices
from talklora_pl.routing import RoutingCollector, RoutingRecord

EXAMPLE_TOKENS = 200  # shown of one text


@dataclass
class ExampleRouting:
    """One text and who spoke: routing weights of its tokens, (T,E), by layer."""

    task: str
    tokens: list[str]
    weights: dict[str, Tensor]


@dataclass
class Inspection:
    """Everything that the report shows.

    Attributes:
        load: over all tokens.
        sensitivity: ``change`` and ``jacobian`` by layer, (L,), in the order of ``layers``; see
            :mod:`talklora_pl.monitoring.sensitivity`.
        communication: who listens to whom, by layer.
        experts: number of experts of every adapted layer.
        texts: number of texts.
    """

    load: Load
    layers: list[str]
    sensitivity: dict[str, Tensor]
    communication: dict[str, Tensor]
    experts: dict[str, int]
    examples: list[ExampleRouting] = field(default_factory=list)
    texts: int = 0


@torch.inference_mode()
def inspect(
    model: nn.Module, adapter: Adapter, tokenizer: Any, batches: Iterable[dict[str, Any]], examples: int = 8
) -> Inspection:
    """Run batches through a model and watch the routing.

    Args:
        model: with its adapter on.
        batches: ``input_ids`` and ``attention_mask`` (B,S), ``task`` per row, or per question with ``group`` (B,).
        examples: texts to show token by token, as many of every task as there is room for.
    """
    model.eval()
    layers = adapter.routed_layers()
    load, sensitivity = RoutingLoad(layers), Sensitivity(layers)
    device = next(model.parameters()).device
    load, sensitivity = load.to(device), sensitivity.to(device)
    shown: dict[str, list[ExampleRouting]] = {}
    texts = 0
    x: dict[str, Tensor] = {}
    for batch in batches:
        batch = to_device(batch, device)
        ids_BS, mask_BS = batch["input_ids"], batch["attention_mask"]
        groups = batch["group"].tolist() if "group" in batch else range(len(ids_BS))
        tasks = [batch["task"][g] for g in groups]
        with RoutingCollector(adapter, mask_BS) as collector, DecisionInputs(adapter, mask_BS) as inputs:
            model(**model_inputs(batch))
        load.update(collector.records, tasks)
        sensitivity.update(inputs)
        x = inputs.x
        texts += len(ids_BS)
        seen_groups: set[int] = set()
        for row, (group, task) in enumerate(zip(groups, tasks, strict=True)):
            mine = shown.setdefault(task, [])
            if group not in seen_groups and len(mine) < examples:  # of a question the first choice only
                mine.append(_example(tokenizer, task, ids_BS, mask_BS, row, collector.records))
            seen_groups.add(group)
    turns = [example for turn in range(examples) for mine in shown.values() for example in mine[turn : turn + 1]]
    return Inspection(
        load=load.summary(),
        layers=list(layers),
        sensitivity={key: value_L.cpu() for key, value_L in sensitivity.compute().items()},
        communication=communication_matrices(adapter, x),
        experts=adapter.experts_per_layer,
        examples=turns[:examples],
        texts=texts,
    )


def _example(
    tokenizer: Any, task: str, ids_BS: Tensor, mask_BS: Tensor, row: int, records: list[RoutingRecord]
) -> ExampleRouting:
    keep_S = mask_BS[row].bool()
    ids = ids_BS[row][keep_S].tolist()[:EXAMPLE_TOKENS]
    weights = {}
    for r in records:
        w_TE = r.routing.weights_TE
        if w_TE.shape[1] > 1 and len(w_TE) == mask_BS.numel():
            w_BSE = w_TE.view(*mask_BS.shape, -1)
            weights[r.layer] = w_BSE[row][keep_S][:EXAMPLE_TOKENS].float().cpu()
    return ExampleRouting(task, [tokenizer.decode([i]) for i in ids], weights)
