"""A Trainer that keeps everything of a run in the run's own folder, and the record of the run."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl import stopping
from talklora_pl.errors import UserError
from talklora_pl.internals.lightning import keep_logs_in
from talklora_pl.monitoring.tensorboard import first_page
from talklora_pl.runs import Run, all_runs, new_run


@dataclass
class RunPlace:
    """Where a run is kept.

    Attributes:
        root: folder of all runs.
        name: of a new one; None: the next number.
        run: the one to go on with.
        ckpt_path: what the run begins from.
        writes: it is a fit, which nobody else may write to.
        checkpoints, adapters: folders of its own elsewhere (``checkpoint.dirpath``, ``export.dirpath``).
        moves_logs: loggers were made from options, and so may write into the folder of the run.
    """

    root: Path
    name: str | None
    run: Run | None
    ckpt_path: str | None
    writes: bool
    checkpoints: str | None = None
    adapters: str | None = None
    moves_logs: bool = True

    def check(self) -> None:
        """Raise a UserError where the fit would replace what another run has written into a folder elsewhere."""
        if not self.writes:
            return
        places = {"checkpoint.dirpath": (self.checkpoints, ".ckpt"), "export.dirpath": (self.adapters, "")}
        for option, (place, end) in places.items():
            found = [path for name in ("last", "best") if place and (path := Path(place, name + end)).exists()]
            if found and self._is_of_another(str(place)):
                raise UserError(
                    f"{option}: {found[0]} is there already, of another run, and this one would replace it. Choose "
                    "another folder, or go on with that run by --ckpt_path last."
                )

    def _is_of_another(self, place: str) -> bool:
        owners = [r for r in all_runs(self.root) if os.path.abspath(place) in r.folders()]
        return self.run not in owners if owners else self.ckpt_path is None

    def enter(self) -> list[tuple[Run, int]]:
        """Make the folder and lock it, with those elsewhere. One process does, when all are there."""
        locks: list[tuple[Run, int]] = []
        try:
            places = {self.adapters: "export.dirpath", self.checkpoints: "checkpoint.dirpath"} if self.writes else {}
            for place, option in places.items():
                if place is None:
                    continue
                elsewhere = Run(Path(place))
                try:
                    elsewhere.folder.mkdir(parents=True, exist_ok=True)
                except OSError as e:
                    raise UserError(f"{option}: {place} cannot be made: {e.strerror}.") from None
                locks.append((elsewhere, elsewhere.lock()))
            self.check()
            new = self.run is None
            if self.run is not None and not self.writes and not os.access(self.run.folder, os.W_OK):
                raise UserError(
                    f"The run {self.run.folder} cannot be written to, and an evaluation keeps its scores and logs "
                    "there. --trainer.default_root_dir FOLDER keeps them elsewhere."
                )
            self.run = self.run or new_run(self.root, self.name)
            if self.writes:
                locks.append((self.run, self.run.lock()))
        except UserError:
            for run, lock in locks:
                run.unlock(lock)
            raise
        if new and self.writes:
            stopping.at_once.append(self.run.abandon)
        return locks


class Nowhere:
    """Takes scalars and keeps none; for pictures and text it is no writer at all."""

    def add_scalar(self, *args: Any) -> None: ...

    add_scalars = add_scalar


class RunLogger(TensorBoardLogger):
    """TensorBoard in the folder of the run. A resumed run writes nothing before its checkpoint is accepted."""

    def __init__(self, root: str) -> None:
        super().__init__(root, name="", version="")
        self.folder = root
        self.open = False

    @property
    def log_dir(self) -> str:
        return self.folder

    @property
    def version(self) -> str:
        return os.path.basename(self.folder)

    @property
    def experiment(self) -> Any:
        return super().experiment if self.open else Nowhere()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        super().log_metrics({**metrics, **first_page(metrics)}, step)

    def save(self) -> None:
        if self.open:
            super().save()


def begin(logger: Any) -> None:
    """Let a logger of a service begin, before there is work to lose.

    Raises:
        UserError: it cannot: nobody is logged in, its server or its store is not there.
    """
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return
    try:
        logger.experiment  # noqa: B018
    except Exception as e:  # each has errors of its own
        raise UserError(f"trainer.logger: {type(logger).__name__} cannot begin: {' '.join(str(e).split())}") from e


class Trainer(L.Trainer):
    """Lightning's, whose ``log_dir`` is the run's folder under every logger and none."""

    place: RunPlace | None = None
    _locks: Sequence[tuple[Run, int]] = ()
    _entered = False

    @property
    def log_dir(self) -> str | None:
        """The folder of the run, chosen by the first process. Lightning asks first when all processes are connected.

        Raises:
            UserError: another process writes to it, or it cannot be made.
        """
        if self.place is None:
            return super().log_dir
        if not self._entered:
            self._enter(self.place)
            self._entered = True
        assert self.place.run is not None
        return str(self.place.run.folder)

    def _enter(self, place: RunPlace) -> None:
        answer: Any = None
        if self.is_global_zero:
            try:
                self._locks = place.enter()
                self._keep_logs(place)
                for logger in self.loggers:
                    begin(logger)
                answer = place.run, place.ckpt_path
            except UserError as e:  # the others wait for an answer
                answer = e
        answer = self.strategy.broadcast(answer)
        if isinstance(answer, UserError):
            raise answer
        place.run, ckpt_path = answer
        if ckpt_path != place.ckpt_path:
            raise UserError(f"--ckpt_path: {ckpt_path} for the first process, {place.ckpt_path} for this one.")
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(place.run.folder, "checkpoints")
        if not self.is_global_zero:
            self._keep_logs(place)

    def _keep_logs(self, place: RunPlace) -> None:
        """Loggers that write files write them into the folder of the run, unless they were made in Python."""
        assert place.run is not None
        folder = str(place.run.folder)
        for logger in self.loggers:
            if isinstance(logger, RunLogger):
                logger.folder = folder
                logger.open = not (place.writes and place.ckpt_path)
            elif place.moves_logs and (before := keep_logs_in(logger, folder)):
                rank_zero_info(f"{type(logger).__name__} writes into {folder}, not into {before}.")
            elif not place.moves_logs and (own := logger.log_dir or logger.save_dir):
                rank_zero_info(
                    f"{type(logger).__name__} writes into {own}, as it was made; config, checkpoints and adapters are "
                    f"in {folder}."
                )

    def leave(self) -> None:
        """Let others write to the run's folder."""
        for run, lock in self._locks:
            run.unlock(lock)
        self._locks = ()


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` and ``run.json``: what the run is, and how far it came.

    A resumed run that is refused, or over, leaves those that are there.

    Args:
        about: what tells the run from others.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, about: Mapping[str, Any], **options: Any) -> None:
        super().__init__(parser, config, **options)
        self.about = {
            "method": about.get("method"),
            "data": _data(config.data.train),
            "base": config.model.base.path,
            "seed": config.seed_everything,
            "adapters": config.export.dirpath and os.path.abspath(config.export.dirpath),
        }
        self._began = False

    def setup(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:  # type: ignore[override]
        if stage == "fit" and not _place(trainer).ckpt_path:
            self._begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:  # type: ignore[override]
        super().setup(trainer, pl_module, "fit")
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.open = True
        if not self._began:
            self._begin(trainer)
        stopping.at_once.clear()  # from here on there is something to keep
        stopping.waiting = False

    def _begin(self, trainer: Trainer) -> None:
        self._began, run = True, _run(trainer)
        record = run.record
        checkpoint: Any = trainer.checkpoint_callback
        self._write(
            trainer,
            **self.about,
            state="running",
            step=trainer.global_step,
            scores=record.get("scores", {}),
            started=record.get("started", time.time()),
            checkpoints=os.path.abspath(checkpoint.dirpath) if checkpoint is not None else None,
            process=os.getpid(),
            host=socket.gethostname(),
            job=stopping.slurm_job(),
        )

    def _write(self, trainer: Trainer, **values: Any) -> None:
        if trainer.is_global_zero and self._began and trainer.state.fn == "fit":
            _run(trainer).write(**values)

    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._write(trainer, step=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:  # type: ignore[override]
        if not trainer.sanity_checking:
            scores = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_") and "/" not in k}
            self._write(trainer, scores={k: v for k, v in scores.items() if math.isfinite(v)})

    def on_fit_end(self, trainer: Trainer, pl_module: L.LightningModule) -> None:  # type: ignore[override]
        self._write(trainer, state="finished", step=trainer.global_step)

    def on_exception(  # type: ignore[override]
        self, trainer: Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        stopped = isinstance(exception, SystemExit | KeyboardInterrupt)
        with suppress(OSError):  # the disk may be what stopped it
            self._write(trainer, state="stopped" if stopped else "failed", step=trainer.global_step)
        if not self._began:  # refused before anything was written
            for act in stopping.at_once:
                act()
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: L.LightningModule, stage: str) -> None:  # type: ignore[override]
        if stage == "fit":
            stopping.at_once.clear()
            trainer.leave()


def _place(trainer: Trainer) -> RunPlace:
    assert trainer.place is not None
    return trainer.place


def _run(trainer: Trainer) -> Run:
    run = _place(trainer).run
    assert run is not None
    return run


def _data(train: Any) -> str:
    """What is trained on, in a few words."""
    if isinstance(train, Mapping) and "path" not in train:  # sources by name
        train = list(train.values())
    entries = train if isinstance(train, list) else [train]
    return ", ".join(str(getattr(e, "path", None) or (e["path"] if isinstance(e, Mapping) else e)) for e in entries)
