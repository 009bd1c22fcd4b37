"""What a training step computes of a batch, as a function of its tensors: by itself, or recorded and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from talklora_pl import captured
from talklora_pl.balance import balance_losses
from talklora_pl.inputs import packed_rows
from talklora_pl.names import ADAPTERS
from talklora_pl.objectives import Objective
from talklora_pl.routing import Routing, RoutingCollector, RoutingRecord


@dataclass(frozen=True)
class Passed:
    """A forward pass of one micro-batch.

    Attributes:
        sums: of the loss (``train_loss``) and what else the objective reports, over what carries loss.
        count: how much that is.
        balance: weighted sum of the balance losses.
        each: every balance loss by name, without its weight or a gradient.
        routing: of every layer.
    """

    sums: dict[str, Tensor]
    count: int
    balance: Tensor
    each: dict[str, Tensor]
    routing: list[RoutingRecord]

    def loss(self, weight: float | Tensor, balance_weight: float | Tensor) -> Tensor:
        """The sum of the loss and the balance loss, each with its weight."""
        return _times(self.sums["train_loss"], weight) + _times(self.balance, balance_weight)

    def without_gradients(self) -> Passed:
        """The same, of which no graph is left."""
        sums = {name: value.detach() for name, value in self.sums.items()}
        routing = [replace(r, routing=Routing(*map(_detached, r.routing))) for r in self.routing]
        return replace(self, sums=sums, balance=self.balance.detach(), routing=routing)


def _times(value: Tensor, weight: float | Tensor) -> Tensor:
    return value * (weight.to(value.dtype) if isinstance(weight, Tensor) else weight)


def _detached(value: Tensor | None) -> Any:
    return None if value is None else value.detach()


def collector(model: Any, batch: Mapping[str, Any]) -> RoutingCollector:
    """Collects the routing of a forward pass of this batch."""
    return RoutingCollector(model, batch["attention_mask"], batch.get("task_types"), packed_rows(batch))


def forward(model: Any, objective: Objective, batch: Mapping[str, Any]) -> Passed:
    """Run the model on a batch, with the losses of the adapter ``default``."""
    with collector(model, batch) as collected:
        loss_sum, count, *observed = objective.loss(model, batch)
    sums = {"train_loss": loss_sum, **(observed[0] if observed else {})}
    if batch.get("filler"):  # it only keeps this rank in step with the others
        sums = {name: value * 0 for name, value in sums.items()}
    total, each = balance_losses(getattr(model, ADAPTERS)["default"], collected.records)
    return Passed(sums, count, total, {name: value.detach() for name, value in each.items()}, collected.records)


def captured_steps(tuner: Any) -> captured.CapturedSteps | None:
    """The steps of a :class:`~talklora_pl.module.FineTuner` as CUDA graphs; says why not, if they cannot be."""

    if obstacle := _obstacle(tuner):
        rank_zero_warn(f"model.cuda_graph: steps are not recorded: {obstacle}.")
        return None

    def say(reason: str) -> None:  # each process about its own batches
        warnings.warn(f"model.cuda_graph: {reason}", stacklevel=2)

    def compute(batch: dict[str, Any]) -> tuple[Tensor, Passed]:
        passed = forward(tuner.model, tuner.objective, batch)
        return passed.loss(batch["weight"], batch["balance_weight"]), passed.without_gradients()

    return captured.CapturedSteps(tuner.model, compute, say)


def _obstacle(tuner: Any) -> str:
    trainer = tuner.trainer
    if tuner.device.type != captured.KIND:
        return "there is no GPU"
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        return f"trainer.strategy {type(trainer.strategy).__name__} puts the model together within them"
    if trainer.world_size > 1 and tuner.adapter_config.balance:
        return "balance losses add up what all processes have within them"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "the loss of float16 is scaled behind them, when the gradients are there already"
    if not tuner.objective.packs:
        return f"model.objective {tuner.objective.name} has batches of other shapes"
    return ""
