"""How much of an adapter its static merge keeps: base, static merge and exact adapter side by side on the same rows.

N judged positions, V vocabulary (or classes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talklora_pl.evaluation import Generation, TaskScores
from talklora_pl.inputs import model_inputs, to_device, token_logits
from talklora_pl.objectives import Objective
from talklora_pl.pieces import token_nll

if TYPE_CHECKING:
    from rich.table import Table

Turn = Callable[[], AbstractContextManager[Any]]
"""Makes the model one of those that are compared, inside of a context."""


@dataclass
class Fidelity:
    """Numbers by model: ``base`` (not for a classifier, which it is not), ``static`` and ``exact``.

    Attributes:
        rows, positions: how many were judged: positions whose next token carries loss (rows of a classifier).
        kl: mean over positions of KL(exact || model), nats.
        agreement: share of positions at which the most likely token (class) is that of the exact model.
        perplexity: exp of the mean negative log-likelihood of the right token (class).
        scores: of :meth:`~talklora_pl.evaluation.TaskScores.compute`, by task.
    """

    rows: int = 0
    positions: int = 0
    kl: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, dict[str, str]]]:
        """The table: what was measured, and the number of every model."""
        out = [
            ("KL from exact (nats per position)", {m: f"{v:.3g}" for m, v in self.kl.items()}),
            ("agrees on the most likely token", {m: f"{v:.3f}" for m, v in self.agreement.items()}),
            ("perplexity", {m: f"{v:.4g}" for m, v in self.perplexity.items()}),
        ]
        exact = self.scores.get("exact", {})
        for task, scores in exact.items():
            if task == "mean" and len(exact) == 2:
                continue
            for name in ("accuracy", "exact_match"):
                if name in scores:
                    values = {m: f"{s[task][name]:.3f}" for m, s in self.scores.items() if name in s.get(task, {})}
                    out.append((f"{task}: {name.replace('_', ' ')}", values))
        return out

    def table(self) -> Table:
        """For people."""
        from rich.table import Table

        out = Table(title=f"Fidelity on {self.rows} rows, {self.positions} positions")
        out.add_column("", overflow="fold")
        for model in self.kl:
            out.add_column(model, justify="right", no_wrap=True)
        for what, values in self.lines():
            out.add_row(what, *(values.get(model, "–") for model in self.kl))
        return out


@torch.no_grad()
def compare(
    model: Any,
    models: Mapping[str, Turn],
    objective: Objective,
    learned: Iterable[Mapping[str, Any]],
    asked: Iterable[dict[str, Any]],
    tasks: list[str],
    generate: Generation | None,
) -> Fidelity:
    """Compare what one model is in several states, of which the last is ``exact``.

    Args:
        model: in eval mode.
        learned: batches as for training, for distributions at the positions that carry loss.
        asked: evaluation batches of the same rows, for scores by task.
        generate: to answer what is open; None: nothing is generated.
    """
    out = Fidelity()
    device = next(model.parameters()).device
    kl, same, nll = (dict.fromkeys(models, 0.0) for _ in range(3))
    for batch in learned:
        batch = to_device(batch, device)
        out.rows += len(batch["input_ids"])
        exact_NV = None
        for name in reversed(list(models)):
            with models[name]():
                logits_NV, targets_N = _judged(model, batch)
            exact_NV = logits_NV if exact_NV is None else exact_NV
            nll[name] += float(token_nll(logits_NV, targets_N).sum())
            kl[name] += float(kl_from(exact_NV, logits_NV).sum())
            same[name] += float((logits_NV.argmax(-1) == exact_NV.argmax(-1)).sum())
        out.positions += len(targets_N)
    total = {name: TaskScores(tasks).to(device) for name in models}
    for batch in asked:
        batch = to_device(batch, device)
        for name, turn in models.items():
            with turn():
                total[name].update(objective.score(model, batch, generate), batch["task"])
    n = max(out.positions, 1)
    out.kl, out.agreement = ({m: v / n for m, v in sums.items()} for sums in (kl, same))
    out.perplexity = {m: math.exp(min(v / n, 700)) for m, v in nll.items()}
    out.scores = {m: scores.compute() for m, scores in total.items()}
    return out


def kl_from(exact_NV: Tensor, other_NV: Tensor) -> Tensor:
    """KL(exact || other) of every position in nats, (N,); in pieces, since logits in float32 are large."""
    pieces = zip(exact_NV.split(1024), other_NV.split(1024), strict=True)
    out = []
    for exact, other in pieces:
        log_p, log_q = exact.float().log_softmax(-1), other.float().log_softmax(-1)
        out.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(out) if out else exact_NV.new_zeros(0, dtype=torch.float32)


def _judged(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits and the right tokens of all positions that carry loss, or those of a classifier's rows."""
    if batch["labels"].dim() == 1:
        return model(**model_inputs(batch)).logits, batch["labels"]
    logits_NV, targets_N, _ = token_logits(model, batch)
    return logits_NV, targets_N
