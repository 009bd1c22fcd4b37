"""What Lightning does beside its documented interface, as far as a run that stops and goes on rests on it."""

from __future__ import annotations

import copy
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from talklora_pl.internals import lightning as internals


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(10, 1))  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def trainer(folder: Path, callback: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": 1, "logger": CSVLogger(folder), "log_every_n_steps": 1} | options
    return L.Trainer(accelerator="cpu", callbacks=[callback], num_sanity_val_steps=0, **quiet, **options)


@pytest.mark.parametrize(("accumulate", "batches"), [(1, 10), (4, 10), (3, 7), (5, 10)])
def test_a_step_ends_where_lightning_steps(accumulate: int, batches: int, tmp_path: Path) -> None:
    found = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            ends = internals.step_ends(trainer)
            assert ends is not trainer.fit_loop._should_accumulate()
            found.append((ends, trainer.global_step))

    trainer(tmp_path, Watch(), accumulate_grad_batches=accumulate, limit_train_batches=batches).fit(Module())
    steps = [0, *(step for _, step in found)]
    assert [ends for ends, _ in found] == [after > before for before, after in pairwise(steps)]


def test_a_module_knows_whether_it_has_a_trainer(tmp_path: Path) -> None:
    module, run = Module(), trainer(tmp_path, L.Callback(), max_steps=1)
    assert internals.trainer_of(module) is None
    run.fit(module)
    assert internals.trainer_of(module) is run


def test_loggers_take_the_step_that_they_are_told(tmp_path: Path) -> None:
    class Shift(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            internals.logged_step(trainer, trainer.global_step + 100)

    run = trainer(tmp_path, Shift(), limit_train_batches=3, limit_val_batches=0)
    run.fit(Module())
    header, *rows = (Path(run.log_dir) / "metrics.csv").read_text().splitlines()  # type: ignore[arg-type]
    at = header.split(",").index("step")
    assert [row.split(",")[at] for row in rows] == ["100", "101", "102"]


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 4}, {"check_val_every_n_epoch": 2, "max_epochs": 3}])
def test_a_validation_follows_where_it_is_said_to(options: dict[str, Any], tmp_path: Path) -> None:
    events: list[Any] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            events.append(internals.validation_follows(trainer))

        def on_validation_start(self, *args: Any) -> None:
            events.append("validation")

    trainer(tmp_path, Watch(), **options).fit(Module())
    assert "validation" in events
    assert [i for i, e in enumerate(events) if e is True] == [i - 1 for i, e in enumerate(events) if e == "validation"]


def test_what_a_step_logged_is_written_before_the_run_ends(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                internals.log_now(trainer)
                raise KeyboardInterrupt

    run = trainer(tmp_path, Stop())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(Module())
    run.logger.save()  # type: ignore[union-attr]
    assert len((Path(run.log_dir) / "metrics.csv").read_text().splitlines()) == 3  # type: ignore[arg-type]


def test_what_steps_log_can_be_exchanged_before_the_loggers_have_it(tmp_path: Path) -> None:
    asked: list[tuple[int, bool]] = []

    class Exchange(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            asked.append((trainer.global_step, internals.logs_now(trainer)))
            ((held, value),) = internals.logged_values(trainer)
            assert value == trainer.callback_metrics["loss"]
            internals.put_logged_value(held, torch.tensor(float(trainer.global_step)))

    run = trainer(tmp_path, Exchange(), log_every_n_steps=2, max_steps=5)
    run.fit(Module())
    assert asked == [(step, step % 2 == 0) for step in range(1, 6)]
    lines = (Path(run.log_dir) / "metrics.csv").read_text().splitlines()  # type: ignore[arg-type]
    place = lines[0].split(",").index("loss")
    assert [line.split(",")[place] for line in lines[1:]] == ["2.0", "4.0"]


def test_lightning_leaves_the_signals_alone(tmp_path: Path) -> None:
    found = []

    class Own(L.Callback):
        def __init__(self, ask: bool) -> None:
            self.ask = ask

        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            if self.ask:
                internals.without_signal_handlers(trainer)

        def on_train_start(self, *args: Any) -> None:
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    for ask in (False, True):
        trainer(tmp_path, Own(ask), max_steps=1).fit(Module())
    lightnings, ours = found
    assert lightnings is not before and ours is before
    # what it calls at every batch of several processes (tests/distributed counts what they ask each other)
    assert "_broadcast_sigterm_tensor" in _TrainingEpochLoop.advance.__code__.co_names


def test_the_mesh_has_the_size_that_it_is_told() -> None:
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    assert strategy._data_parallel_size == "auto"
    internals.data_parallel_over(strategy, 3)
    source = ModelParallelStrategy.setup_environment.__code__.co_names
    assert strategy._data_parallel_size == 3 and "_data_parallel_size" in source


def test_loop_counters_in_a_checkpoint_make_lightning_validate(tmp_path: Path) -> None:
    """Saved after step 4, before its validation: the resumed run starts with the whole of it, then trains on."""

    class Save(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
            loops = checkpoint["loops"]["fit_loop"]
            before = copy.deepcopy(loops)
            internals.first_validation_batch_started(loops)
            assert loops.keys() == before.keys()
            total, current, is_last = internals.training_batches(loops)
            assert total["processed"] == current["processed"] == current["completed"] == 4 and not is_last

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)

    trainer(tmp_path, Save(), val_check_interval=4, max_steps=4).fit(Module())

    events: list[str] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            events.append("train")

        def on_validation_batch_start(self, *args: Any) -> None:
            events.append("validate")

    trainer(tmp_path, Watch(), val_check_interval=4).fit(Module(), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert events[:11] == ["validate"] * 10 + ["train"]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger, WandbLogger])
def test_loggers_write_where_they_are_told(kind: Any, tmp_path: Path) -> None:
    if kind is WandbLogger:
        pytest.importorskip("wandb")
    logger = kind(save_dir=str(tmp_path / "own"), **({"offline": True} if kind is WandbLogger else {}))
    assert internals.keep_logs_in(logger, str(tmp_path / "run")) == str(tmp_path / "own")
    (tmp_path / "run").mkdir()
    logger.log_metrics({"x": 1.0}, step=0)
    logger.save()
    logger.finalize("success")
    if kind is WandbLogger:
        logger.experiment.finish()
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] and not (tmp_path / "own").exists()
