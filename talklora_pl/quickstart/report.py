"""What the model answers before and after, and which experts serve which task.

T tokens, E experts, J tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talklora_pl.adapter import disable_adapter
from talklora_pl.inputs import model_inputs, to_device
from talklora_pl.routing import RoutingCollector

if TYPE_CHECKING:
    from rich.table import Table

    from talklora_pl.module import FineTuner


@torch.no_grad()
def answers_table(tuner: FineTuner, batches: Iterable[dict[str, Any]]) -> Table:
    """The first question of every task with its answers without and with the adapter."""
    from rich.table import Table

    asked: dict[str, Tensor] = {}
    for batch in batches:
        lengths = batch["prompt_length"].tolist()
        for task, ids, length, real in zip(batch["task"], batch["input_ids"], lengths, batch["real"], strict=True):
            if real and task not in asked:
                asked[task] = ids[:length].to(tuner.model.device)
    tuner.model.eval()
    answer, asked = tuner.generation(), dict(sorted(asked.items()))
    with disable_adapter(tuner.model):
        before = answer(list(asked.values()))
    after = answer(list(asked.values()))
    out = Table(title="One question of each, before and after")
    for name, share in {"question": 5, "before": 3, "after": 3}.items():
        out.add_column(name, ratio=share, overflow="fold")
    for ids, (first, _), (then, _) in zip(asked.values(), before, after, strict=True):
        question = tuner.tokenizer.decode(ids, skip_special_tokens=True)
        out.add_row(*map(_shown, (question, first, then)))
    return out


def _shown(text: str) -> str:
    """On one line, without what a terminal or rich would take for a command."""
    from rich.markup import escape

    text = " ".join(text.split())
    return escape("".join(c if c.isprintable() else "?" for c in text)) or "(nothing)"


@torch.no_grad()
def experts_by_task(tuner: FineTuner, batches: Iterable[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Mean routing weight of every expert over all real tokens of a task: ``{layer: {task: share_E}}``, layers with
    one expert left out."""
    sums: dict[str, dict[str, Tensor]] = {}
    tuner.model.eval()
    for batch in batches:
        batch = to_device(batch, tuner.model.device)
        mask_BS = batch["attention_mask"]
        with RoutingCollector(tuner.model, mask_BS) as collector:
            tuner.model(**model_inputs(batch))
        rows_of = {
            task: torch.tensor([batch["task"][q] == task for q in batch["group"].tolist()], device=mask_BS.device)
            for task in batch["task"]
        }
        for record in collector.records:
            weights_TE = record.routing.weights_TE
            if weights_TE.shape[1] < 2 or len(weights_TE) != mask_BS.numel():
                continue
            layer = sums.setdefault(record.layer, {})
            for task, rows_B in rows_of.items():
                chosen_T = (mask_BS.bool() & rows_B[:, None]).reshape(-1)
                total_E = weights_TE[chosen_T].sum(0).double().cpu()
                layer[task] = layer.get(task, torch.zeros_like(total_E)) + total_E
    return {
        layer: {task: total_E / total_E.sum() for task, total_E in sorted(tasks.items())}
        for layer, tasks in sums.items()
    }


def specialisation(share_JE: Tensor) -> float:
    """Mutual information of task and expert in bits, all tasks weighted alike: 0 if every task is routed alike,
    log2(min(J, E)) at most. H(mean over j of p_j) - mean over j of H(p_j)."""

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1) / torch.log(torch.tensor(2.0))

    return float(entropy(share_JE.mean(0)) - entropy(share_JE).mean())


def specialist_table(by_layer: dict[str, dict[str, Tensor]]) -> Table:
    """The routing weights of the layer in which tasks differ most, one line per task."""
    from rich.table import Table

    scores = {layer: specialisation(torch.stack(list(tasks.values()))) for layer, tasks in by_layer.items()}
    layer = max(scores, key=scores.__getitem__)
    mean = sum(scores.values()) / len(scores)
    out = Table(
        title="Which experts serve which skill (mean routing weight)",
        caption_justify="left",
        caption=f"{layer}: of {len(scores)} layers the one where skills differ most, "
        f"{scores[layer]:.3f} bits of mutual information (mean of all layers {mean:.3f}).",
    )
    out.add_column("skill")
    tasks = by_layer[layer]
    for e in range(len(next(iter(tasks.values())))):
        out.add_column(f"expert {e}", justify="right")
    for task, share_E in tasks.items():
        best = int(share_E.argmax())
        out.add_row(task, *(f"[bold]{p:.2f}[/bold]" if e == best else f"{p:.2f}" for e, p in enumerate(share_E)))
    return out
