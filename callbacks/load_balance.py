"""Who carries the load: metrics and pictures of the routing, while training and in every evaluation."""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from talklora_pl.adapter_module import AdapterModule
from talklora_pl.monitoring.alerts import AlertRules, Alerts
from talklora_pl.monitoring.host import read_back
from talklora_pl.monitoring.metrics import Load, RoutingLoad, overlap, top_experts
from talklora_pl.monitoring.sensitivity import DecisionInputs, communication_matrices
from talklora_pl.monitoring.tensorboard import Board
from talklora_pl.routing import RoutingCollector, RoutingRecord

PROBE_TOKENS = 2048


class LoadBalance(L.Callback):
    """Logs how the experts are used; for the metrics see :class:`talklora_pl.monitoring.metrics.Load`.

    Training: ``load/*`` of the global batch (all micro-steps and ranks, pads left out) of every optimiser step that the
    trainer logs (``trainer.log_every_n_steps``). Evaluation: ``val_load/*`` over all validation data, and
    ``val_load/churn``, the share of expert choices that changed since the evaluation before on a fixed set of tokens.
    Pictures, text and the HParams tab go to a logger that takes them (TensorBoard).

    Args:
        mode: ``brief`` logs means over layers, ``detailed`` every layer as well.
        figures: draw pictures after every evaluation; in a run without validation, every ``figure_steps``.
        figure_steps: optimiser steps between pictures in a run without validation.
        dead_below: an expert with less than this share of the ideal load counts as dead.
        alerts: when to warn; null never.
    """

    def __init__(
        self,
        mode: Literal["brief", "detailed"] = "brief",
        figures: bool = True,
        figure_steps: int = 100,
        dead_below: float = 0.01,
        alerts: AlertRules | None = AlertRules(),  # noqa: B008
    ) -> None:
        self.mode = mode
        self.figures = figures
        self.figure_steps = figure_steps
        self.dead_below = dead_below
        self.alerts = Alerts(alerts) if alerts is not None else None
        self.train_load: RoutingLoad | None = None
        self.val_load: RoutingLoad | None = None
        self.latest: Load | None = None
        self._observing = False
        self._step = 0
        self._evaluation = ExitStack()
        self._inputs: dict[str, Tensor] = {}
        self._probe: dict[str, Tensor] = {}
        self._probe_text = 0
        self._probe_left = 0
        self._before: dict[str, Any] = {}
        self._start: dict[str, Tensor] = {}  # communication, when training began

    # --- state: the rest is made anew at every logged step or evaluation

    def state_dict(self) -> dict[str, Any]:
        alerts = self.alerts.state() if self.alerts else {}
        return {"probe": self._before, "alerts": alerts, "communication": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["probe"]
        self._start = state_dict.get("communication", {})
        if self.alerts:
            self.alerts.restore(state_dict["alerts"])

    # --- training

    def on_fit_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        layers = pl_module.adapter.routed_layers()
        self.train_load = RoutingLoad(layers).to(pl_module.device) if layers else None
        board = Board(trainer)
        board.describe_run(pl_module)
        self._start = self._start or _copies(communication_matrices(pl_module.adapter))
        if self.figures and board.pictures:
            from talklora_pl.monitoring import figures

            board.figure("experts/allocation", figures.allocation(pl_module.adapter.experts_per_layer))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: AdapterModule, batch: Any, batch_idx: int) -> None:
        self._step, every = trainer.global_step, _log_every(trainer)  # 0: never
        self._observing = self.train_load is not None and every > 0 and (self._step + 1) % every == 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: AdapterModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._observing:
            return
        assert self.train_load is not None
        self.train_load.update(pl_module.routing, batch.get("task"), _is_filler(batch), batch.get("group"))
        if trainer.global_step == self._step:  # further micro-steps of this optimiser step follow
            return
        load = self.train_load.summary(partial(read_back, trainer))
        self.train_load.reset()
        board = Board(trainer)
        if not load.layers:
            return
        self._log(pl_module, board, "load", load)
        if self.alerts:
            for key, count, message in self.alerts.check(load, self._step + 1, self.dead_below):
                pl_module.log(f"alerts/{key}", float(count), batch_size=1)
                if message:
                    board.warn(key, message)
        if (
            self.figures
            and not trainer.enable_validation
            and (self._step + 1) % self.figure_steps < _log_every(trainer)
        ):
            self._draw(pl_module, board, load)

    # --- evaluation

    def on_validation_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        layers = pl_module.adapter.routed_layers()
        self.val_load = RoutingLoad(layers).to(pl_module.device) if layers and not trainer.sanity_checking else None
        self._probe, self._probe_text = {}, 0
        # the probe is the main process's part of the validation data, because its state alone is checkpointed
        self._probe_left = PROBE_TOKENS if trainer.is_global_zero else 0

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: AdapterModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.val_load is None:
            return
        if self.figures and batch_idx == 0 and trainer.is_global_zero:
            inputs = DecisionInputs(pl_module.adapter, batch["attention_mask"])
            self._inputs = self._evaluation.enter_context(inputs).x
        self._collector = self._evaluation.enter_context(RoutingCollector(pl_module.adapter, batch["attention_mask"]))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: AdapterModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.val_load is None:
            return
        self._evaluation.close()
        self.val_load.update(self._collector.records, batch.get("task"), _is_filler(batch), batch.get("group"))
        if self._probe_left > 0:
            self._add_probe(self._collector.records, batch)
        del self._collector

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        if self.val_load is None:
            return
        load = self.val_load.summary()
        self.val_load = None
        if not load.layers:
            return
        board = Board(trainer)
        self._log(pl_module, board, "val_load", load)
        churn, compared = self._churn()
        churn, compared = (
            float(trainer.strategy.reduce(torch.tensor(v, device=pl_module.device), reduce_op="sum"))
            for v in (churn, compared)
        )
        if compared:
            pl_module.log("val_load/churn", churn, batch_size=1)
        if self.figures:
            self._draw(pl_module, board, load)

    def on_exception(self, trainer: L.Trainer, pl_module: AdapterModule, exception: BaseException) -> None:
        self._evaluation.close()

    # --- parts

    def _log(self, pl_module: AdapterModule, board: Board, prefix: str, load: Load) -> None:
        self.latest = load
        values = load.aggregates(self.dead_below)
        pl_module.log_dict({f"{prefix}/{key}": value for key, value in values.items()}, batch_size=1)
        if self.mode == "detailed":
            board.layers(prefix, load, self.dead_below)

    def _draw(self, pl_module: AdapterModule, board: Board, load: Load) -> None:
        if not board.pictures:
            return
        from talklora_pl.monitoring import figures

        board.figure("experts/load", figures.load(load))
        if len(load.tasks) > 1:
            board.figure("experts/tasks", figures.tasks(load))
        matrices = communication_matrices(pl_module.adapter, self._inputs)
        if not self._start:  # it depends on the tokens: the first evaluation is what the others are compared with
            self._start = _copies(matrices)
        elif matrices.keys() <= self._start.keys():
            changes = {name: matrix - self._start[name] for name, matrix in matrices.items()}
            board.figure("experts/communication", figures.communication(changes, change=True))

    def _add_probe(self, records: list[RoutingRecord], batch: Any) -> None:
        self._probe_left -= int(batch["attention_mask"].sum())
        self._probe_text = zlib.crc32(batch["input_ids"].cpu().numpy().tobytes(), self._probe_text)
        for r in records:
            new_TK = top_experts(r)
            old_TK = self._probe.get(r.layer, new_TK[:0])
            self._probe[r.layer] = torch.cat([old_TK, new_TK])

    def _churn(self) -> tuple[float, float]:
        """(1 - mean overlap with the evaluation before, 1), or zeros where the same tokens were not seen before."""
        before, self._before = self._before, {"text": self._probe_text, "experts": self._probe}
        if not self._probe or before.get("text") != self._probe_text:
            return 0.0, 0.0
        same = [overlap(before["experts"][k], now_TK) for k, now_TK in self._probe.items() if k in before["experts"]]
        return (1 - sum(same) / len(same), 1.0) if same else (0.0, 0.0)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _log_every(trainer: L.Trainer) -> int:
    return trainer.log_every_n_steps  # type: ignore[attr-defined]


def _is_filler(batch: Any) -> bool:
    """Whether the batch only keeps this rank in step with the others."""
    if "filler" in batch:  # in training
        return bool(batch["filler"])
    if "real" in batch:
        return not bool(batch["real"].any())
    return "labels" in batch and bool((batch["labels"] == -100).all())
