"""Lightning, 2.6: its loops and connectors, for training that stops and goes on at any step."""

from __future__ import annotations

import traceback
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor


def step_ends(trainer: L.Trainer) -> bool:
    """Whether the current micro-batch is the last of its optimiser step: no gradients wait for the next one.

    True from ``on_train_batch_start`` to the end of the validation that follows. All names are public here; what counts
    as the last one is Lightning's.
    """
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if batches.current.ready % trainer.accumulate_grad_batches == 0:
        return True
    last = batches.is_last_batch or batches.current.ready == trainer.num_training_batches
    return last and not trainer.strategy.handles_gradient_accumulation


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """The trainer that a module is attached to, if it is; the attribute itself raises an error."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def logged_step(trainer: L.Trainer, step: int) -> None:
    """Set the step under which Lightning logs next.

    It counts optimiser steps a second time for the loggers, and after some resumes that count is off by one.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation follows the newest training batch; asked in ``on_train_batch_end``.

    Intervals in batches, epochs and time, early stopping and the last batch all have their say.
    """
    # the argument matters only to a `training_step(dataloader_iter)`
    return trainer.fit_loop.epoch_loop._should_check_val_fx(None)  # type: ignore[arg-type]


def log_now(trainer: L.Trainer) -> None:
    """Write what the training step logged; Lightning does it after ``on_train_batch_end``, where a run may end."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def logs_now(trainer: L.Trainer) -> bool:
    """Whether the loggers get what the training step logged; asked in ``on_train_batch_end``.

    A run that is about to stop logs its last step out of turn.
    """
    tries_out: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]
    return step_ends(trainer) and (trainer._logger_connector.should_update_logs or bool(tries_out))


def logged_values(trainer: L.Trainer) -> list[tuple[Any, Tensor]]:
    """What training steps logged for the loggers, each value with what holds it for :func:`put_logged_value`.

    Lightning turns them into numbers one by one, each a wait for the device, and no option lets it take them together.
    """
    held = [r for r in trainer.fit_loop.epoch_loop._results.values() if r.meta.on_step and not r.meta.enable_graph]
    return [(r, r._forward_cache) for r in held if isinstance(r._forward_cache, Tensor) and not r.has_reset]


def put_logged_value(holder: Any, value: Tensor) -> None:
    """Let the loggers and the progress bar have this for one of :func:`logged_values`; means over an epoch stay."""
    holder._forward_cache = value


def without_signal_handlers(trainer: L.Trainer) -> None:
    """Let `trainer` install no signal handlers of its own, nor ask at every batch what they heard.

    Asked before the fit begins. The one for SIGTERM waits for the other ranks inside of the handler, where it can hang,
    and there is no option. Several processes tell each other by way of the device, which the host then waits for.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def data_parallel_over(strategy: ModelParallelStrategy, processes: int) -> None:
    """Make the data-parallel part of the mesh of this size; asked before ``setup_environment``.

    The size has to be passed to the constructor, which knows neither devices nor nodes; Lightning then takes the number
    of nodes.
    """
    strategy._data_parallel_size = processes


def first_validation_batch_started(loops: dict[str, Any]) -> None:
    """Change a checkpoint's loop counters to those amid a validation, of which Lightning then runs the whole.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``. Those of a checkpoint that is written while a validation is due
            say nothing of it, and the resumed run leaves it out.
    """
    started = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loops["epoch_loop.val_loop.batch_progress"].update(total=dict(started), current=dict(started), is_last_batch=False)
    for count in training_batches(loops)[:2]:
        count["completed"] = count["processed"]


def back_to_the_last_step(loops: dict[str, Any], accumulate: int) -> None:
    """Change a checkpoint's loop counters, taken amid an optimiser step, to those at the end of the step before.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``.
        accumulate: micro-batches of a step. What those of the unfinished one gave is in no checkpoint.
    """
    total, current, _ = training_batches(loops)
    amid = current["processed"] % accumulate
    for count in (total, current):
        done = count["processed"] - amid
        count.update(ready=done, started=done, processed=done, completed=done)
    none = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    loops["epoch_loop.val_loop.batch_progress"].update(total=dict(none), current=dict(none), is_last_batch=False)


def keep_logs_in(logger: Logger, folder: str) -> str | None:
    """Let a logger that writes files write them into `folder`; asked before it opens any.

    Returns:
        The folder that it was made with; None where it keeps its own: MLflow's store is one for all runs, and online
        loggers write nothing.
    """
    before = logger.save_dir
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        logger._root_dir = folder
        if isinstance(logger, CSVLogger):
            logger._save_dir = folder
    elif isinstance(logger, WandbLogger):
        logger._save_dir = logger._wandb_init["dir"] = folder
    else:
        return None
    return str(before)


def training_batches(loops: dict[str, Any]) -> tuple[dict[str, int], dict[str, int], bool]:
    """Counters of training batches in a checkpoint: of all epochs, of the current one, and whether that one is over.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``.
    """
    progress = loops["epoch_loop.batch_progress"]
    return progress["total"], progress["current"], progress["is_last_batch"]


def raised_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself refused something, as opposed to what it called.

    It refuses most options by a ValueError once the data are there (`val_check_interval` above the number of batches),
    and so does a plugin that is broken, whose traceback is wanted.
    """
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("lightning.")
