"""Stop cleanly when the machine is taken away or the user asks: a signal saves a checkpoint and ends the run."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl import stopping
from talklora_pl.internals.lightning import log_now, step_ends, without_signal_handlers
from talklora_pl.ranks import over_ranks


class Preemption(L.Callback):
    """Save and end when any rank receives SIGTERM, SIGUSR1 or SIGINT (Ctrl-C).

    While training, the signal only sets a flag; the ranks agree on it by one number between the hosts after each
    optimiser step and before each validation batch, save ``last.ckpt`` beside the other checkpoints, and every worker
    exits with 143, or 130 after Ctrl-C. A signal during the writing of a checkpoint therefore lets the writing finish.
    Before the first step there is nothing to save and the process ends at once; after the last one the run simply
    finishes. A second Ctrl-C ends the run without saving. The grace time must cover one optimiser step and the writing
    of one checkpoint.

    Lightning's own handlers for both signals are not installed: the one for SIGTERM waits for the other ranks *inside*
    the signal handler and can hang there, the one for SLURM would requeue a second time.

    Args:
        requeue: on SIGUSR1 inside a SLURM job (``#SBATCH --signal=USR1@90``) also run ``scontrol requeue``, before the
            first step too. The job script should pass ``--ckpt_path last``, which finds nothing at the first start and
            the saved state later.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
        self._received, self._since, self._process = 0, 0.0, os.getpid()
        self._phase = "before"  # the first step; then "training", then "after" the last
        self._previous: dict[int, Any] = {}

    # ------------------------------------------------------------------ signals

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._trainer, self._phase, self._process = trainer, "before", os.getpid()
        stopping.requeues = self.requeue
        without_signal_handlers(trainer)
        for number in stopping.SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process: Ctrl-C in a terminal goes to all
        first, self._received = not self._received, max(self._received, number)
        if first:
            self._since = time.monotonic()
            self._pass_on(number)
        if self._phase == "before":
            if self._launched_by_rank_zero():
                os._exit(0)
            if callable(before := self._previous[number]):  # the command line knows how to end
                before(number, frame)
            sys.exit(self._exit_code())
        if number == signal.SIGINT and self._phase == "training":
            if time.monotonic() - self._since > 1:  # the first may come twice, from the terminal and from a peer
                raise KeyboardInterrupt
            rank_zero_info("Ctrl-C: saving after this step. Once more to end without saving.")

    def _pass_on(self, number: int) -> None:
        """Processes that Lightning's script launcher made know of each other what torchrun and SLURM know."""
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(number)
        elif self._launched_by_rank_zero():
            os.kill(os.getppid(), number)

    def _launched_by_rank_zero(self) -> bool:
        environment = getattr(self._trainer.strategy, "cluster_environment", None)
        return isinstance(environment, LightningEnvironment) and environment.local_rank() > 0

    def _exit_code(self) -> int:
        # rank zero's observer of the processes it launched kills rank zero if one of them "fails"
        return 0 if self._launched_by_rank_zero() else stopping.exit_code(self._received)

    # ------------------------------------------------------------------ places to stop at

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase = "training"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase = "after"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # the gradients of a half-finished step are in no checkpoint
        if step_ends(trainer) and self._asked(trainer):
            log_now(trainer)
            self._stop(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._phase == "training" and trainer.validating and self._asked(trainer):
            self._stop(trainer)

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether any rank received a signal; all ranks get the same answer."""
        (agreed,) = over_ranks([self._received], "max")
        if agreed:  # else leave alone what the handler may have set meanwhile
            self._received = agreed
        return bool(agreed)

    def _stop(self, trainer: L.Trainer) -> None:
        path = directory(trainer) / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        rank_zero_info(
            f"{signal.Signals(self._received).name}: saved {path} after step {trainer.global_step}. "
            "Resume with --ckpt_path last."
        )
        if self.requeue and trainer.is_global_zero:
            stopping.requeue(self._received)
        sys.exit(self._exit_code())


def directory(trainer: L.Trainer) -> Path:
    """Where this run keeps its checkpoints."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath)
    return Path(trainer.default_root_dir) / "checkpoints"
