"""The launchers as they really are: Lightning's own, torchrun, SLURM's variables."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.runs import TIMEOUT, distance, finish, free_port, newest, spawn

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
pytestmark = pytest.mark.slow


def arguments(config: Path, folder: Path, *more: str) -> list[str]:
    argv = ["-m", "talklora_pl", "fit", "--config", str(config), "--trainer.default_root_dir", str(folder)]
    return [*argv, "--data.batch_size", "2", *more]


def progress(folder: Path, sleep: str = "0.2") -> list[str]:
    name = "--trainer.callbacks"
    return [f"{name}+=tests.distributed.faults.Progress", f"{name}.folder", str(folder), f"{name}.sleep", sleep]


def wait_for_step(folder: Path, step: int, rank: int = 0) -> int:
    """Pid of a rank that has reached a step."""
    end = time.monotonic() + TIMEOUT
    file = folder / f"step.{rank}"
    while not file.exists() or int(file.read_text().split()[0]) < step:
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.05)
    return int(file.read_text().split()[1])


def test_script_launcher_equals_one_and_stops_on_sigterm(config: Path, tmp_path: Path, reference: Path) -> None:
    """``kill`` of the process the user started, or of its child, saves and ends both; the shell sees 143."""
    argv = [sys.executable, *arguments(config, tmp_path, "--trainer.devices", "2", "--trainer.strategy", "ddp")]
    for step, rank in ((1, 0), (3, 1)):
        p = spawn([*argv, "--ckpt_path", "last", *progress(tmp_path)], tmp_path)
        os.kill(wait_for_step(tmp_path, step, rank), signal.SIGTERM)
        assert finish(p) == 143, (tmp_path / "log").read_text()
    p = spawn([*argv, "--ckpt_path", "last"], tmp_path)
    assert finish(p) == 0, (tmp_path / "log").read_text()
    assert distance(newest(tmp_path), reference) < 1e-11


def test_torchrun_restarts_after_a_kill(config: Path, tmp_path: Path, reference: Path) -> None:
    """The recipe of docs/distributed.md: a killed worker, a restart of all, and the end as if nothing had happened."""
    command = [TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1", *arguments(config, tmp_path)]
    command += ["--trainer.strategy", "fsdp", "--ckpt_path", "last", "--checkpoint.every_n_train_steps", "1"]
    p = spawn([*command, *progress(tmp_path)], tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    os.kill(wait_for_step(tmp_path, 3, rank=1), signal.SIGKILL)
    assert finish(p, 180) == 0, (tmp_path / "log").read_text()
    assert distance(newest(tmp_path), reference) < 1e-11


def test_slurm_requeues_once(config: Path, tmp_path: Path, reference: Path) -> None:
    """SLURM's variables and a fake scontrol: SIGUSR1 saves, requeues once, and the next start goes on."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    (tools / "scontrol").chmod(0o755)
    shared = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "train",
    }

    def tasks(*more: str) -> list:  # type: ignore[type-arg]
        port = str(free_port())
        argv = [sys.executable, *arguments(config, tmp_path, "--trainer.devices", "2", "--ckpt_path", "last", *more)]
        return [
            spawn(argv, tmp_path, MASTER_PORT=port, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **shared) for i in (0, 1)
        ]

    running = tasks("--trainer.strategy", "ddp", *progress(tmp_path))
    pids = [wait_for_step(tmp_path, 2, rank) for rank in (0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    assert [finish(p) for p in running] == [143, 143], (tmp_path / "log").read_text()
    assert (tmp_path / "scontrol").read_text() == "requeue 4242\n"
    assert [finish(p) for p in tasks("--trainer.strategy", "fsdp")] == [0, 0], (tmp_path / "log").read_text()
    assert distance(newest(tmp_path), reference) < 1e-11
