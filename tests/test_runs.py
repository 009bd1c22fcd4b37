"""Folders, locks and records of runs, without training anything."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from talklora_pl.cli.trainer import RunPlace
from talklora_pl.errors import UserError
from talklora_pl.runs import Run, all_runs, new_run, run_of, to_go_on

FORK = multiprocessing.get_context("fork")


def a_run(root: Path, name: str, state: str = "stopped", **record: object) -> Run:
    """A run with a checkpoint, of which nobody holds the lock."""
    run = new_run(root, name)
    run.checkpoints.mkdir()
    (run.checkpoints / "last.ckpt").touch()
    run.write(state=state, step=3, method="talklora", **record)
    return run


def test_the_package_of_runs_is_free_of_torch() -> None:
    code = "import sys, talklora_pl.cli.runs, talklora_pl.stopping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_folder_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    run = a_run(tmp_path, "mine")
    shutil.rmtree(run.folder)
    with pytest.warns(UserWarning, match="mine was removed while its run was at work"):
        run.write(state="finished", step=4)
    assert (run.state, run.record["step"]) == ("finished", 4)


def _make(root: Path, names: multiprocessing.Queue[str]) -> None:
    for _ in range(20):
        names.put(new_run(root).name)


def test_two_at_once_never_meet(tmp_path: Path) -> None:
    names: multiprocessing.Queue[str] = FORK.Queue()
    both = [FORK.Process(target=_make, args=(tmp_path / "runs", names)) for _ in range(2)]
    for p in both:
        p.start()
    got = [names.get(timeout=60) for _ in range(40)]
    for p in both:
        p.join()
    assert len(set(got)) == 40 == len(list((tmp_path / "runs").iterdir()))


def test_a_name_is_given_once(tmp_path: Path) -> None:
    new_run(tmp_path, "mine")
    with pytest.raises(UserError, match="mine already"):
        new_run(tmp_path, "mine")


def _hold(run: Run, ready: multiprocessing.Queue[int]) -> None:
    run.lock()
    if (child := os.fork()) == 0:  # a loader process that outlives the one that is killed
        time.sleep(30)
        os._exit(0)
    ready.put(child)
    time.sleep(30)


def test_the_lock_of_a_live_run_names_its_process_and_that_of_a_dead_one_is_free(tmp_path: Path) -> None:
    run = a_run(tmp_path, "a", state="running")
    ready: multiprocessing.Queue[int] = FORK.Queue()
    holder = FORK.Process(target=_hold, args=(run, ready))
    holder.start()
    child = ready.get(timeout=30)
    try:
        assert run.live() and run.state == "running at step 3"
        with pytest.raises(UserError, match=rf"process {holder.pid} on "):
            run.lock()
        with pytest.raises(UserError, match=rf"process {holder.pid} on "):
            to_go_on(tmp_path)
        holder.kill()
        holder.join()
        assert not run.live() and run.state == "failed at step 3"
        before = (run.folder / ".lock").read_bytes()
        descriptor = run.lock()
        assert run.live() and (run.folder / ".lock").read_bytes() != before
        run.unlock(descriptor)
        assert not run.live() and (run.folder / ".lock").read_bytes() == b""
    finally:
        os.kill(child, 9)


def test_which_run_goes_on(tmp_path: Path) -> None:
    """The one that has not ended; the one of this job; the only one; never a guess."""
    assert to_go_on(tmp_path) is None
    new_run(tmp_path)  # nothing to go on from
    assert to_go_on(tmp_path) is None
    first = a_run(tmp_path, "first", state="finished")
    assert to_go_on(tmp_path) == first
    second = a_run(tmp_path, "second", job="7")
    assert to_go_on(tmp_path) == second
    third = a_run(tmp_path, "third", job="8")
    with pytest.raises(UserError, match=r"(?s)several runs.*second: talklora stopped at step 3.*third.*--run_name"):
        to_go_on(tmp_path)
    assert to_go_on(tmp_path, job="7") == second and to_go_on(tmp_path, job="8") == third
    for run in (second, third):
        run.write(state="finished")
    with pytest.raises(UserError, match=r"(?s)several runs.*first: talklora finished.*third"):
        to_go_on(tmp_path)


def test_a_checkpoint_leads_to_its_run(tmp_path: Path) -> None:
    run, elsewhere = a_run(tmp_path / "runs", "a"), tmp_path / "elsewhere"
    other = new_run(tmp_path / "runs", "b")
    other.write(checkpoints=str(elsewhere))
    assert run_of(run.checkpoints / "best.ckpt", tmp_path / "runs") == run
    assert run_of(elsewhere / "last.ckpt", tmp_path / "runs") == other
    assert run_of(tmp_path / "other.ckpt", tmp_path / "runs") is None
    assert {r.name for r in all_runs(tmp_path / "runs")} == {"a", "b"}


def test_a_damaged_record_says_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path, "a")
    (run.folder / "run.json").write_text('{"state": "fin')
    assert run.record == {} and run.state == "unknown"


@pytest.mark.parametrize(("option", "file"), [("checkpoints", "last.ckpt"), ("adapters", "best")])
def test_a_folder_elsewhere_is_of_one_run(tmp_path: Path, option: str, file: str) -> None:
    """Nobody replaces what is in it, nor writes to it at the same time."""
    root, kept = tmp_path / "runs", tmp_path / "kept"
    place = {option: str(kept)}
    first = RunPlace(root, None, None, None, True, **place)
    first.check()
    locks = first.enter()
    with pytest.raises(UserError, match=rf"{kept} is still going on: process {os.getpid()}"):
        RunPlace(root, None, None, None, True, **place).enter()
    assert len(list(root.iterdir())) == 1  # the one that was refused leaves nothing
    (kept / file).touch()
    assert first.run is not None
    first.run.write(**{option: str(kept)})
    for run, lock in locks:
        run.unlock(lock)
    for run, ckpt_path in ((None, None), (None, "x.ckpt"), (a_run(root, "other"), "runs/other/checkpoints/last.ckpt")):
        with pytest.raises(UserError, match="there already, of another run"):
            RunPlace(root, None, run, ckpt_path, True, **place).enter()
    RunPlace(root, None, first.run, "kept/last.ckpt", True, **place).check()
    RunPlace(root, None, None, None, False, **place).check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    run = a_run(tmp_path, "a")
    run.folder.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        run.lock()
