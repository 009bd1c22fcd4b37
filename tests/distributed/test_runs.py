"""No run replaces another, and stopping keeps what there is; real processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from talklora_pl.cli import main
from tests.distributed.runs import TIMEOUT, Run, fit, load, newest
from tests.distributed.test_resume import interrupt, same_runs


def command(config: Path, folder: Path, *options: str) -> list[str]:
    return ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder), *options]


def signal_at(where: str, name: str, step: int = 0) -> list[str]:
    fault = ["--trainer.callbacks+=tests.distributed.faults.SignalAt", "--trainer.callbacks.step", str(step)]
    return [*fault, "--trainer.callbacks.where", where, "--trainer.callbacks.name", name]


def files(folder: Path) -> dict[str, str]:
    """Digest of every file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def listed(folder: Path, capsys: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["runs", "--root", str(folder), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


LOGGERS = {
    "none": ("--trainer.logger", "false"),
    "csv": ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "LOGS"),
}


@pytest.mark.parametrize("logger", LOGGERS)
def test_every_fit_has_a_folder_and_last_finds_it(config: Path, tmp_path: Path, capsys: Any, logger: str) -> None:
    options = [o.replace("LOGS", str(tmp_path / "logs")) for o in LOGGERS[logger]]
    root = tmp_path / "runs"
    for seed in ("1", "2"):
        fit(config, root, *options, "--trainer.max_steps", "2", "--seed_everything", seed)
        if seed == "1":
            first = files(root / "version_0")
    assert files(root / "version_0") == first
    rows = listed(root, capsys)
    assert [(r["name"], r["seed"], r["state"]) for r in rows] == [
        ("version_0", 1, "finished"),
        ("version_1", 2, "finished"),
    ]
    # two could be meant
    asked = Run.start(root, command(config, root, *options, "--ckpt_path", "last"))
    assert asked.wait() == [2] and "could mean several runs" in asked.log() and "version_1: " in asked.log()
    fit(config, root, *options, "--ckpt_path", "last", "--run_name", "version_1")
    assert load(root / "version_1/checkpoints/last.ckpt")["global_step"] == 8
    assert (root / "version_1/adapters/last").is_dir() and (root / "version_1/config.yaml").exists()
    assert files(root / "version_0") == first and not (root / "version_2").exists()
    if logger == "csv":  # logs too are in the run's folder, whatever the logger's own is
        assert len(list((root / "version_1").rglob("metrics.csv"))) == 2 and not (tmp_path / "logs").exists()
        assert "CSVLogger writes into" in (root / "log0").read_text()


def test_names(config: Path, tmp_path: Path, capsys: Any) -> None:
    """The first start of a job and all others are one command."""
    job = ["--run_name", "mine", "--ckpt_path", "last", "--trainer.max_steps"]
    fit(config, tmp_path, *job, "2")
    fit(config, tmp_path, *job, "3")
    assert load(tmp_path / "mine/checkpoints/last.ckpt")["global_step"] == 3
    taken = Run.start(tmp_path, command(config, tmp_path, "--run_name", "mine"))
    assert taken.wait() == [2] and "--ckpt_path last" in taken.log()
    outside = Run.start(tmp_path, command(config, tmp_path, "--run_name", "../mine"))
    assert outside.wait() == [2] and "not the name of a folder" in outside.log()
    assert [r["name"] for r in listed(tmp_path, capsys)] == ["mine"]


def test_two_at_once_do_not_meet(config: Path, tmp_path: Path, capsys: Any) -> None:
    both = [
        Run.start(tmp_path / f"log{seed}", command(config, tmp_path / "runs", "--seed_everything", str(seed)))
        for seed in (1, 2)
    ]
    assert [run.wait() for run in both] == [[0], [0]], both[0].log() + both[1].log()
    rows = listed(tmp_path / "runs", capsys)
    assert sorted((r["name"], r["state"]) for r in rows) == [("version_0", "finished"), ("version_1", "finished")]
    assert {r["seed"] for r in rows} == {1, 2}
    for row in rows:
        assert yaml.safe_load((Path(row["folder"]) / "config.yaml").read_text())["seed_everything"] == row["seed"]


def test_a_live_run_is_not_resumed_a_second_time(config: Path, tmp_path: Path, capsys: Any) -> None:
    slow = ["--trainer.callbacks+=tests.distributed.faults.Progress", "--trainer.callbacks.folder", str(tmp_path)]
    slow += ["--trainer.callbacks.sleep", "0.2", "--checkpoint.every_n_train_steps", "1", "--trainer.max_steps", "1000"]
    first = Run.start(tmp_path / "first", command(config, tmp_path / "runs", *slow))
    end = time.monotonic() + TIMEOUT
    while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
        assert time.monotonic() < end and first.processes[0].exitcode is None, first.log()
        time.sleep(0.05)
    second = Run.start(tmp_path / "second", command(config, tmp_path / "runs", "--ckpt_path", "last"))
    assert second.wait() == [2]
    assert f"process {first.processes[0].pid} on " in second.log() and "Traceback" not in second.log()
    (row,) = listed(tmp_path / "runs", capsys)
    assert row["state"].startswith("running at step ")
    os.kill(first.processes[0].pid, signal.SIGTERM)
    assert first.wait() == [143]
    (row,) = listed(tmp_path / "runs", capsys)
    step = load(newest(tmp_path / "runs"))["global_step"]
    assert row["state"] == f"stopped at step {step}" and step > 0


def test_a_refused_resume_changes_nothing(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path / "runs", "--trainer.max_steps", "3")
    before = files(tmp_path / "runs")
    again = Run.start(tmp_path, command(config, tmp_path / "runs", "--ckpt_path", "last", "--data.seed", "7"))
    assert again.wait() == [2] and "seed" in again.log(), again.log()
    log = {name: digest for name, digest in files(tmp_path / "runs").items() if not name.startswith("log")}
    assert log == {name: digest for name, digest in before.items() if not name.startswith("log")}


def test_a_folder_of_checkpoints_is_not_taken_over(config: Path, tmp_path: Path) -> None:
    place = ["--checkpoint.dirpath", str(tmp_path / "kept"), "--trainer.max_steps"]
    first = Run.start(tmp_path, command(config, tmp_path / "runs", *place, "2"))
    assert first.wait() == [0], first.log()
    before = (tmp_path / "kept/last.ckpt").read_bytes()
    other = Run.start(tmp_path, command(config, tmp_path / "runs", *place, "3"))
    assert other.wait() == [2] and "of another run" in other.log()
    assert (tmp_path / "kept/last.ckpt").read_bytes() == before
    run = Run.start(tmp_path, command(config, tmp_path / "runs", *place, "3", "--ckpt_path", "last"))
    assert run.wait() == [0], run.log()
    assert load(tmp_path / "kept/last.ckpt")["global_step"] == 3
    assert [p.name for p in (tmp_path / "runs").glob("version_*")] == ["version_0"]


def test_ctrl_c_in_the_first_epoch_saves(config: Path, tmp_path: Path) -> None:
    run = Run.start(tmp_path, command(config, tmp_path, *signal_at("train", "SIGINT", step=2)))
    assert run.wait() == [130], run.log()
    assert "SIGINT: saved" in run.log() and "after step 3" in run.log() and "Traceback" not in run.log()
    assert load(newest(tmp_path))["global_step"] == 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_before_the_first_step(config: Path, tmp_path: Path, name: str) -> None:
    """Under SLURM SIGUSR1 requeues, once; a new run leaves no folder, a resumed one is as it was."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    (tools / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "PATH": f"{tools}:{os.environ['PATH']}"}
    argv = command(config, tmp_path / "runs", "--ckpt_path", "last", *signal_at("start", name))
    run = Run.start(tmp_path / "log", argv, **slurm)
    assert run.wait() == [130 if name == "SIGINT" else 143], run.log()
    assert "Traceback" not in run.log() and "nothing to keep" in run.log()
    called = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
    assert called == ("requeue 7\n" if name == "SIGUSR1" else "")
    assert not list((tmp_path / "runs").iterdir())


def test_a_checkpoint_by_time(config: Path, tmp_path: Path) -> None:
    """In the first epoch, without validation, on two processes that must agree."""
    options = ["--checkpoint.every_minutes", "0.00001", "--data.batch_size", "2", "--trainer.strategy", "ddp"]
    kill = ["--trainer.callbacks+=tests.distributed.faults.SignalAt", "--trainer.callbacks.step", "4"]
    run = Run.start(tmp_path, command(config, tmp_path, *options, *kill, "--trainer.callbacks.name", "SIGKILL"), 2)
    assert "hang" not in run.wait()
    assert load(newest(tmp_path))["global_step"] == 4


def test_no_end_is_three_epochs(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path, "--trainer.max_steps", "-1")
    assert "No end is given: training ends after 3 epochs" in (tmp_path / "log0").read_text()
    assert load(newest(tmp_path))["global_step"] == 3 * 8


def test_validation_amid_an_accumulation(config: Path, tmp_path: Path) -> None:
    """The process is lost, or a signal comes, where gradients wait for the rest of their step."""
    options = (
        "--trainer.accumulate_grad_batches",
        "2",
        "--trainer.val_check_interval",
        "3",
        "--trainer.max_steps",
        "7",
    )
    fit(config, tmp_path / "full", *options)
    interrupt(config, tmp_path / "cut", 1, *options, where="validation")  # after micro-batch 3 of 8
    assert load(newest(tmp_path / "cut"))["global_step"] == 1
    interrupt(config, tmp_path / "cut", 3, *options, where="validation")  # after micro-batch 6, the end of a step
    lost = signal_at("validation", "SIGKILL", step=5)
    run = Run.start(tmp_path / "cut", command(config, tmp_path / "cut", *options, "--ckpt_path", "last", *lost))
    assert run.wait() == [-signal.SIGKILL]
    fit(config, tmp_path / "cut", *options, "--ckpt_path", "last")
    same_runs(tmp_path / "cut", tmp_path / "full")
