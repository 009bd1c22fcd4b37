"""What goes to a logger beside scalars: pictures, text, the description of the run and the layout of the scalars.

Scalars work with every Lightning logger; TensorBoard, W&B and MLflow also get pictures and text.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from talklora_pl.monitoring.metrics import Load
from talklora_pl.registry import Component

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# charts of the custom scalars tab: title -> regular expressions of the beginning of tags
LAYOUT = {
    "Loss": {
        "task loss": ["train_loss$", "val_loss$"],
        "task loss by task": ["val_loss/.*"],
        "balance losses": ["balance/.*"],
    },
    "Scores": {
        "accuracy": ["val_accuracy$", "test_accuracy$"],
        "accuracy by task": ["val_accuracy/.*", "test_accuracy/.*"],
        "exact match": ["val_exact_match$", "test_exact_match$"],
    },
    "Training": {
        "learning rate": ["train/lr.*"],
        "norm of the gradient, before clipping": ["train/grad_norm"],
        "tokens per second": ["cost/tokens_per_second"],
        "share of pads": ["cost/pad_share"],
        "peak memory, GiB": ["cost/peak_memory_gib"],
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

METRICS = [f"{stage}_{name}" for stage in ("val", "test") for name in ("loss", "accuracy", "exact_match")]
METRICS += ["train_loss", "load/cv", "load/effective_experts", "load/token_entropy"]
"""Names of what runs are compared by in the HParams tab; the values are those of the curves."""


def first_page(metrics: Mapping[str, float]) -> dict[str, float]:
    """Losses and scores once more, in groups that come first where groups are sorted by name, as in TensorBoard.

    ``train_loss`` is also ``Loss/train``, ``val_accuracy`` is ``Score/val_accuracy``.
    """
    found = {}
    for name, value in metrics.items():
        stage, _, what = name.partition("_")
        if stage in ("train", "val", "test") and what and "/" not in name:
            found[f"Loss/{stage}" if what == "loss" else f"Score/{name}"] = value
    return found


class Board:
    """The loggers of a run; everything but scalars is written by the main process only."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        # what Lightning itself gives as step to the scalars of the step that has just ended
        self.step = max(trainer.global_step - 1, 0)
        # fast_dev_run has a logger that takes every call and does nothing
        self.loggers = [x for x in trainer.loggers if trainer.is_global_zero and not isinstance(x, DummyLogger)]

    def _writers(self, method: str) -> list[Any]:
        """Those of TensorBoard, or what has its methods."""
        experiments = [getattr(logger, "experiment", None) for logger in self._unlike(WandbLogger, MLFlowLogger)]
        return [e for e in experiments if hasattr(e, method)]

    def _of(self, kind: type) -> list[Any]:
        return [logger for logger in self.loggers if isinstance(logger, kind)]

    def _unlike(self, *kinds: type) -> list[Any]:
        return [logger for logger in self.loggers if not isinstance(logger, kinds)]

    @property
    def pictures(self) -> bool:
        """Whether anyone would see a picture."""
        return bool(self._of(WandbLogger) or self._of(MLFlowLogger) or self._writers("add_figure"))

    @property
    def takes_text(self) -> bool:
        """Whether anyone would read a text."""
        return bool(self._of(WandbLogger) or self._of(MLFlowLogger) or self._writers("add_text"))

    def figure(self, tag: str, figure: Figure) -> None:
        for writer in self._writers("add_figure"):
            writer.add_figure(tag, figure, self.step, close=False)
        for logger in self._of(WandbLogger):
            logger.log_image(tag, [figure], self.step)
        for logger in self._of(MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{tag}/{self.step:07}.png")

    def warn(self, key: str, message: str) -> None:
        """One line on the terminal, and text in the log."""
        if self.trainer.is_global_zero:
            warnings.warn_explicit(message, UserWarning, "talklora_pl", 0)
        self.text(f"alerts/{key}", message)

    def text(self, tag: str, text: str, rows: Sequence[Mapping[str, str]] = ()) -> None:
        """Text in the log alone, for what is said elsewhere.

        Args:
            text: as Markdown.
            rows: the same as a table, for a logger that has tables.
        """
        for writer in self._writers("add_text"):
            writer.add_text(tag, text, self.step)
        rows = rows or [{"text": text}]
        for logger in self._of(WandbLogger):
            names = list(dict.fromkeys(name for row in rows for name in row))
            logger.log_text(tag, names, [[row.get(name, "") for name in names] for row in rows], step=self.step)
        for logger in self._of(MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{tag}/{self.step:07}.md")

    def samples(self, shown: Sequence[Mapping[str, str]]) -> None:
        """Prompts and their answers."""
        if not shown:
            return
        # indented, text is text to Markdown
        parts = [f"{name}:\n\n{indent(text or '(nothing)')}" for row in shown for name, text in row.items()]
        self.text("samples", "\n\n".join(parts), shown)

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
            if isinstance(logger, TensorBoardLogger):
                logger.hparams.update(params)  # its hparams.yaml
            else:
                logger.log_hyperparams(params)
        writers = self._writers("add_custom_scalars")
        if not writers:
            return
        from torch.utils.tensorboard.summary import hparams

        for writer in writers:
            writer.add_custom_scalars(
                {c: {title: ["Multiline", tags] for title, tags in charts.items()} for c, charts in LAYOUT.items()}
            )
            for summary in hparams(params, dict.fromkeys(METRICS, 0.0)):
                writer.file_writer.add_summary(summary)


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def words(component: Component) -> str:
    """A component and what of its options is not the default: ``top_k(k=2)``."""
    given = []
    for f in fields(component):  # type: ignore[arg-type]
        value = getattr(component, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if value != default:
            given.append(f"{f.name}={value}")
    return component.name + (f"({', '.join(given)})" if given else "")


def hyperparameters(trainer: L.Trainer, pl_module: Any) -> dict[str, str | int | float | bool]:
    """What a run is compared by, flat: method, data, seed, every part and every size."""
    config = pl_module.adapter.config
    data = getattr(trainer, "datamodule", None)
    parts = {part: words(getattr(config, part)) for part in ("experts", "communication", "router", "allocation")}
    params: dict[str, Any] = {
        # TensorBoard shows the first few in alphabetical order
        "adapter": " / ".join(getattr(config, part).name for part in ("experts", "communication", "router")),
        **parts,
        "balance": " + ".join(map(words, config.balance)) or "none",
        "num_experts": config.num_experts,
        "expert_rank": config.rank_per_expert(),
        "scale": config.scale(),
        "dropout": " / ".join(f"{getattr(config, f'dropout_{x}'):g}" for x in ("input", "routing", "output")),
        "targets": config.targets if isinstance(config.targets, str) else ", ".join(config.targets),
        "base": pl_module.base.path.rstrip("/").rsplit("/", 1)[-1],
        "objective": words(pl_module.objective),
        "method": pl_module.method or "none",
        "run": os.path.basename(trainer.log_dir or ""),
        "trained_parameters": sum(p.numel() for p in pl_module.trained().values()),
        "precision": str(trainer.precision),
        "clip": float(trainer.gradient_clip_val or 0),
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs or -1,
    }
    for optimizer in trainer.optimizers[:1]:
        defaults = optimizer.defaults
        params |= {"optimizer": type(optimizer).__name__, "lr": defaults.get("lr", 0.0)}
        params["weight_decay"] = defaults.get("weight_decay", 0.0)
    params["lr_scheduler"] = ", ".join(type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs) or "none"
    if "PL_GLOBAL_SEED" in os.environ:
        params["seed"] = int(os.environ["PL_GLOBAL_SEED"])
    if sources := getattr(data, "sources", {}).get("train"):
        params["data"] = ", ".join(os.path.basename(str(source.path).rstrip("/")) for source in sources)
    # of the columns that the tab shows at first this is the first
    params["about"] = f"{params['method']} seed {params.get('seed', '?')}"
    if batch_size := getattr(data, "batch_size", None):
        params["global_batch"] = batch_size * trainer.accumulate_grad_batches * trainer.world_size
    return params
