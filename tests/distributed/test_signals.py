"""Signals and kills at random moments: nothing hangs, nothing that was saved is lost, and the end is the same."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from talklora_pl.distributed.checkpoint import last_checkpoint, read_checkpoint
from tests.distributed.runs import TIMEOUT, Run, distance, fit, newest

# Validations and checkpoints are frequent, so that many of the random moments fall into them. With AdamW's usual eps a
# difference of 1e-15 (between one rank and two) becomes 0.4 within 400 steps, with no interruption at all: once the
# rows are learned, every gradient is small and every step is large. With this eps it stays below 1e-16.
LONG = ("--trainer.val_check_interval", "3", "--trainer.max_epochs", "-1", "--trainer.log_every_n_steps", "50")
LONG += ("--model.optimizer.init_args.eps", "0.1")
GRACE = 60.0  # on a machine that does other things, too
RANKS = {
    "one": (1, ()),
    "ddp": (2, ("--trainer.strategy", "ddp", "--data.batch_size", "2")),
    "fsdp": (2, ("--trainer.strategy", "fsdp", "--data.batch_size", "2")),
}


def start(config: Path, folder: Path, how: str, max_steps: int = 100_000) -> Run:
    ranks, options = RANKS[how]
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
    argv += [*LONG, *options, "--trainer.max_steps", str(max_steps)]
    argv += ["--trainer.callbacks+=tests.distributed.faults.Progress", "--trainer.callbacks.folder", str(folder)]
    for file in folder.glob("step.*"):
        file.unlink()
    return Run.start(folder, argv, ranks)


def first_step(run: Run) -> None:
    """Wait until every rank trains."""
    end = time.monotonic() + TIMEOUT
    while len(list(run.folder.glob("step.*"))) < len(run.processes):
        assert time.monotonic() < end and all(p.exitcode is None for p in run.processes), run.log()
        time.sleep(0.02)


def steps_done(folder: Path) -> int:
    path = last_checkpoint(folder)
    return 0 if path is None else int(read_checkpoint(path)["global_step"])


def test_signal_before_the_first_step(config: Path, tmp_path: Path) -> None:
    """Wherever the start-up is, the process ends at once."""
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path), *LONG]
    argv += ["--trainer.max_steps", "100000"]  # a fast machine may train by now, but has not ended
    for delay in (0.0, 0.5, 1.5):
        run = Run.start(tmp_path, argv)
        time.sleep(delay)
        os.kill(run.processes[0].pid, signal.SIGTERM)
        # before the handler is there the signal itself ends the process
        assert run.wait(GRACE)[0] in (143, -signal.SIGTERM), run.log()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_one_signalled_rank_stops_all(config: Path, tmp_path: Path, how: str) -> None:
    for rank, number in ((0, signal.SIGUSR1), (1, signal.SIGTERM)):
        run = start(config, tmp_path, how)
        first_step(run)
        os.kill(run.processes[rank].pid, number)
        assert run.wait(GRACE) == [143, 143], run.log()
    assert steps_done(tmp_path) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("times", [5, pytest.param(20, marks=pytest.mark.nightly)])
def test_preemptions_change_nothing(config: Path, tmp_path: Path, times: int) -> None:
    """SIGTERM or SIGUSR1 to random ranks at random moments; resumed each time, on one process or two."""
    draw, folder, before = random.Random(1), tmp_path / "cut", 0
    for trial in range(times):
        how = ("one", "ddp", "one", "fsdp", "one")[trial % 5]
        run = start(config, folder, how)
        first_step(run)
        time.sleep(draw.random())
        chosen = draw.sample(run.processes, draw.randint(1, len(run.processes)))
        for p in chosen:
            os.kill(p.pid, draw.choice([signal.SIGTERM, signal.SIGUSR1]))
        asked = time.monotonic()
        assert run.wait(GRACE) == [143] * len(run.processes), (trial, run.log())
        assert time.monotonic() - asked < GRACE
        now = steps_done(folder)
        assert now > before, (trial, run.log())
        before = now
    end_as_if_nothing_happened(config, folder, tmp_path / "full", before + 5)


@pytest.mark.slow
@pytest.mark.parametrize("times", [6, pytest.param(30, marks=pytest.mark.nightly)])
def test_kills_lose_nothing_saved(config: Path, tmp_path: Path, times: int) -> None:
    """SIGKILL to one rank at random moments: the others end within seconds, and the last save can be resumed."""
    draw, folder, before = random.Random(2), tmp_path / "cut", 0
    for trial in range(times):
        how = ("one", "ddp", "one", "one", "fsdp", "one")[trial % 6]
        run = start(config, folder, how)
        first_step(run)
        time.sleep(draw.random())
        victim = draw.choice(run.processes)
        os.kill(victim.pid, signal.SIGKILL)
        codes = run.wait(GRACE / 2)
        assert "hang" not in codes and 0 not in codes, (trial, codes, run.log())
        now = steps_done(folder)
        assert now >= before, (trial, run.log())
        before = now
    end_as_if_nothing_happened(config, folder, tmp_path / "full", before + 5)


def end_as_if_nothing_happened(config: Path, folder: Path, full: Path, steps: int) -> None:
    run = start(config, folder, "one", steps)
    assert run.wait() == [0], run.log()
    fit(config, full, *LONG, "--trainer.max_steps", str(steps))
    # the last step alone moves every tensor by 1e-6 to 4e-4
    assert distance(newest(folder), newest(full)) < 1e-10
