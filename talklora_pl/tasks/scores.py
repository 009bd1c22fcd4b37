"""What answers are worth: the metrics of a task, from its records alone, so that they can be computed again.

N questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, binary_matthews_corrcoef

from talklora_pl.tasks.task import Task

if TYPE_CHECKING:
    from rich.table import Table

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": lambda pick_N, right_N: (pick_N == right_N).double().mean(),
    "f1": lambda pick_N, right_N: binary_f1_score(pick_N, right_N.long()),
    "matthews": lambda pick_N, right_N: binary_matthews_corrcoef(pick_N, right_N.long()),
    "pearson": pearson_corrcoef,
    "spearman": spearman_corrcoef,
}


def measure(task: Task, records: Sequence[Mapping[str, Any]], side: str) -> dict[str, float]:
    """The metrics of a task.

    Args:
        records: of :func:`~talklora_pl.tasks.answer.answers`: `label` or `value`, and `pick` of each side.
        side: ``base`` or ``adapter``.

    Returns:
        each metric, and `unanswered`: the share of answers in which nothing was found. Those count as a wrong class (of
        two classes, the other one); as a number, 0. What does not vary correlates with nothing: 0.
    """
    picks = [record[side]["pick"] for record in records]
    if task.value is not None:
        right_N = torch.tensor([record["value"] for record in records], dtype=torch.float64)
        pick_N = torch.tensor([0.0 if pick is None else pick for pick in picks], dtype=torch.float64)
    else:
        right_N = torch.tensor([record["label"] for record in records])
        pick_N = torch.tensor([-1 if pick is None else pick for pick in picks])
        pick_N = torch.where(pick_N < 0, (right_N == 0).long(), pick_N)
    found = {name: float(FUNCTIONS[name](pick_N, right_N)) for name in task.metrics}
    found = {name: value if math.isfinite(value) else 0.0 for name, value in found.items()}
    return found | {"unanswered": picks.count(None) / len(picks)}


def means(results: Mapping[str, Mapping[str, Any]], tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """By way of asking and side: the mean over tasks of the first metric of each."""
    values: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        for way, entry in results.get(task.name, {}).items():
            for side in ("base", "adapter"):
                if side in entry:
                    values.setdefault(way, {}).setdefault(side, []).append(entry[side][task.metrics[0]])
    return {way: {side: sum(v) / len(v) for side, v in sides.items()} for way, sides in values.items()}


def table(rows: Sequence[tuple[str, str, str, str, Mapping[str, float]]], sides: Sequence[str]) -> Table:
    """Scores for people.

    Args:
        rows: task, way of asking, number of questions (or nothing), metric, and the score of each side.
        sides: ``base`` and ``adapter``, or one of them.
    """
    from rich.table import Table

    out = Table(title="Evaluation")
    out.add_column("task", overflow="fold")
    for column in ("by", "questions", "metric", *sides, "standard\nerror"):
        out.add_column(column, justify="left" if column in ("by", "metric") else "right", no_wrap=True)
    for i, (task, way, questions, metric, scores) in enumerate(rows):
        if task != rows[i - 1][0]:
            out.add_section()
        share = scores.get(sides[-1], math.nan)
        error = ""
        if questions and metric in ("accuracy", "acc", "acc_norm") and not math.isnan(share):
            error = f"{math.sqrt(share * (1 - share) / int(questions)):.3f}"
        shown = (f"{scores[side]:.3f}" if side in scores else "–" for side in sides)
        out.add_row(task, way, questions, metric, *shown, error)
    return out
