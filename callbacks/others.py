"""Lightning's own callbacks and settings beside those of this package: made to work, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import ReduceLROnPlateau

from talklora_pl.adapter_module import AdapterModule
from talklora_pl.base import load_config
from talklora_pl.base.quantization import quantization_of
from talklora_pl.errors import UserError
from talklora_pl.registry import did_you_mean

FINDERS = (BatchSizeFinder, LearningRateFinder)
AVERAGES = "it averages a second copy of the whole model, frozen base included, and would put it into every checkpoint"
REFUSED: dict[type[L.Callback], str] = {
    StochasticWeightAveraging: "it copies the model before the adapter is there, and so would average nothing",
    WeightAveraging: AVERAGES,
    BaseFinetuning: "the base stays frozen; to train parts of it along, list them in model.adapter.modules_to_save",
    ModelPruning: "it renames the tensors that it prunes, so the adapter could be neither saved nor resumed",
    OnExceptionCheckpoint: "it resumes by itself from amid a step; last.ckpt is kept anyway, see --ckpt_path last",
}
IN_TRAINING = ("train_", "train/", "cost/", "load/", "balance/", "alerts/")
"""Beginnings of the names of metrics that may come later than the first validation."""
DTYPES = {"16-true": "float16", "bf16-true": "bfloat16", "64-true": "float64"}


def refuse_callbacks(trainer: L.Trainer, pl_module: AdapterModule) -> None:
    """Raise a `UserError` about callbacks that cannot do what they say on a model with an adapter."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    lines = [
        f"trainer.callbacks: {type(callback).__name__} cannot be used here: {reason}."
        for callback in callbacks
        for kind, reason in REFUSED.items()
        if isinstance(callback, kind)
    ]
    if any(isinstance(c, LearningRateFinder) for c in callbacks) and any(g.lr for g in pl_module.param_groups):
        lines.append(
            "trainer.callbacks: LearningRateFinder finds one learning rate, and model.param_groups has several; find "
            "it in a run without them."
        )
    if lines:
        raise UserError("\n".join(lines))


def refuse_quantised(trainer: L.Trainer, pl_module: AdapterModule) -> None:
    """Raise a `UserError` where a strategy shards the base and its weights are kept in few bits."""
    if not hasattr(trainer.strategy, "loads_base"):
        return
    if name := pl_module.base.quantization or quantization_of(load_config(pl_module.base)):
        raise UserError(
            f"trainer.strategy fsdp shards floating-point weights, and those of this base are {name}: model.base."
            "quantization goes with one process or trainer.strategy ddp, where each has the whole base in few bits."
        )


def whole_precision(trainer: L.Trainer, pl_module: AdapterModule) -> None:
    """``16-true``, ``bf16-true`` and ``64-true`` are about the frozen base; adapters are no less than float32."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, (HalfPrecision, DoublePrecision)):
        return
    name: Any = DTYPES[plugin.precision]
    trainer.strategy.precision_plugin = Precision()  # which would convert everything
    pl_module.base = replace(pl_module.base, dtype=name)
    if name == "float64" and pl_module.start is None:
        pl_module.adapter_config = replace(pl_module.adapter_config, dtype=name)
    trained = pl_module.adapter_config.dtype
    rank_zero_info(f"trainer.precision {plugin.precision}: the frozen base in {name}, what is trained in {trained}.")


class OtherCallbacks(L.Callback):
    """What Lightning's EarlyStopping, finders and ReduceLROnPlateau need; :class:`FineTuner` brings it along.

    1. EarlyStopping waits for the first validation, however late it comes; after it the metric must be there.
    2. ReduceLROnPlateau looks at its metric after every validation, before the checkpoint of that is written.
    3. A finder's own checkpoint is not taken for one that the run is resumed from, and a schedule begins at its own
       first rate.
    """

    def __init__(self) -> None:
        self._waits: dict[str, str] = {}  # metric -> who needs it

    def setup(self, trainer: L.Trainer, pl_module: AdapterModule, stage: str) -> None:
        if stage != "fit":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.strict:
                callback.strict = False  # it would end the run before there is anything to judge by
                self._waits[callback.monitor] = f"trainer.callbacks: {type(callback).__name__}"

    def on_fit_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                self._waits[str(config.monitor)] = "model.lr_scheduler: ReduceLROnPlateau"
        data: Any = getattr(trainer, "datamodule", None)
        none = trainer.limit_val_batches == 0 or not len(getattr(data, "tables", {}).get("val", "?"))
        for metric, who in self._waits.items():
            if none and metric.startswith("val"):
                raise UserError(
                    f"{who} watches {metric}, and this run does not validate. Give it data.val or val_size."
                )
        if any(isinstance(c, FINDERS) for c in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.ckpt_path = None
            for (
                config
            ) in trainer.lr_scheduler_configs:  # LearningRateFinder leaves its rate, without the schedule's share
                for group, rate in zip(config.scheduler.optimizer.param_groups, config.scheduler.get_last_lr()):
                    group["lr"] = rate

    def on_validation_end(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        for metric, who in self._waits.items():
            if metric not in metrics and not metric.startswith(IN_TRAINING):
                raise UserError(f"{who} watches {metric!r}, which is not logged.{did_you_mean(metric, metrics)}")
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau) and config.monitor in metrics:
                config.scheduler.step(metrics[config.monitor])
