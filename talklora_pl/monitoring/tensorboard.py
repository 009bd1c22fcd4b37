"""What goes to a logger beside scalars: pictures, warnings as text, the HParams tab and the layout of the scalars.

Scalars work with every Lightning logger; the rest is left out where the logger cannot show it.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from talklora_pl.monitoring.metrics import Load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# charts of the custom scalars tab: title -> regular expressions of the beginning of tags
LAYOUT = {
    "Loss": {
        "task loss": ["train_loss$", "val_loss$"],
        "task loss by task": ["val_loss/.*"],
        "balance losses": ["balance/.*"],
    },
    "Load": {
        "imbalance: coefficient of variation": ["load/cv", "val_load/cv"],
        "overload of the busiest expert: MaxVio": ["load/max_vio$", "load/max_vio_worst", "val_load/max_vio$"],
        "effective number of experts": ["load/effective_experts", "val_load/effective_experts"],
        "share of dead experts": ["load/dead_experts", "val_load/dead_experts"],
    },
    "Decisions": {
        "entropy of a token's routing (1: undecided)": ["load/token_entropy", "val_load/token_entropy"],
        "margin between first and second choice": ["load/margin", "val_load/margin"],
        "churn: choices changed since the last evaluation": ["val_load/churn"],
        "sensitivity to the input": ["sensitivity/.*"],
        "router z": ["load/router_z"],
    },
    "Alerts": {"layers in an alarming state": ["alerts/.*"]},
}


class Board:
    """The loggers of a run; everything but scalars is written by the main process only."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        # what Lightning itself gives as step to the scalars of the step that has just ended
        self.step = max(trainer.global_step - 1, 0)
        # fast_dev_run has a logger that takes every call and does nothing
        loggers = [x for x in trainer.loggers if trainer.is_global_zero and not isinstance(x, DummyLogger)]
        experiments = [getattr(logger, "experiment", None) for logger in loggers]
        self.writers: list[Any] = [e for e in experiments if hasattr(e, "add_figure")]

    @property
    def pictures(self) -> bool:
        """Whether anyone would see a picture."""
        return bool(self.writers)

    def figure(self, tag: str, figure: Figure) -> None:
        for writer in self.writers:
            writer.add_figure(tag, figure, self.step, close=False)

    def warn(self, key: str, message: str) -> None:
        """One line on the terminal, and text in the log."""
        if self.trainer.is_global_zero:
            warnings.warn_explicit(message, UserWarning, "talklora_pl", 0)
        self.text(key, message)

    def text(self, key: str, message: str) -> None:
        """Text in the log alone, for what is said elsewhere."""
        for writer in self.writers:
            writer.add_text(f"alerts/{key}", message, self.step)

    def layers(self, prefix: str, load: Load, dead_below: float) -> None:
        """Every metric and every expert's relative load of every layer, as scalars."""
        values: dict[str, float] = {}
        for key, value_L in load.per_layer(dead_below).items():
            values |= {
                f"{prefix}_layers/{key}/{name}": v for name, v in zip(load.layers, value_L.tolist(), strict=True)
            }
        for name, n, row in zip(load.layers, load.experts_L.tolist(), load.relative_LE.tolist(), strict=True):
            values |= {f"{prefix}_experts/{name}/{i}": v for i, v in enumerate(row[:n])}
        self.scalars(values)

    def scalars(self, values: dict[str, float]) -> None:
        """Scalars that are too many for the trainer's own bookkeeping."""
        for logger in self.trainer.loggers:
            logger.log_metrics(values, self.step)

    def describe_run(self, pl_module: Any) -> None:
        """Hyperparameters, so that runs can be compared by method, and the layout of the custom scalars tab."""
        params = hyperparameters(self.trainer, pl_module)
        for logger in self.trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(params)
        if not self.writers:
            return
        from torch.utils.tensorboard.summary import hparams

        # names only: the values are those of the curves
        metrics = ["train_loss", "val_loss", "load/cv", "load/effective_experts", "load/token_entropy"]
        for writer in self.writers:
            writer.add_custom_scalars(
                {c: {title: ["Multiline", tags] for title, tags in charts.items()} for c, charts in LAYOUT.items()}
            )
            for summary in hparams(params, dict.fromkeys(metrics, 0.0)):
                writer.file_writer.add_summary(summary)


def hyperparameters(trainer: L.Trainer, pl_module: Any) -> dict[str, str | int | float | bool]:
    """What a run is compared by, flat."""
    config = pl_module.adapter.config
    params: dict[str, Any] = {part: getattr(config, part).name for part in ("experts", "communication", "router")}
    params |= {
        # TensorBoard shows the first few in alphabetical order
        "adapter": " / ".join(params.values()),
        "balance": " + ".join(b.name for b in config.balance) or "none",
        "num_experts": config.num_experts,
        "expert_rank": config.rank_per_expert(),
        "scale": config.scale(),
        "targets": config.targets if isinstance(config.targets, str) else ", ".join(config.targets),
        "base": pl_module.base.path.rstrip("/").rsplit("/", 1)[-1],
        "trained_parameters": sum(p.numel() for p in pl_module.trained().values()),
        "precision": str(trainer.precision),
    }
    for optimizer in trainer.optimizers[:1]:
        params |= {"optimizer": type(optimizer).__name__, "lr": optimizer.defaults.get("lr", 0.0)}
    if "PL_GLOBAL_SEED" in os.environ:
        params["seed"] = int(os.environ["PL_GLOBAL_SEED"])
    batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if batch_size:
        params["global_batch"] = batch_size * trainer.accumulate_grad_batches * trainer.world_size
    return params
