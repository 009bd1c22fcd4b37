"""A disk that is full or may only be read: one message, status 2, and what was there stays as it was."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.runs import Run, fit, load
from tests.distributed.test_runs import command, files


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_nothing_is_lost_on_a_full_disk_or_one_that_may_only_be_read(config: Path, tmp_path: Path, small: Path) -> None:
    root = small / "runs"
    again = ["--ckpt_path", "last", "--run_name", "mine", "--trainer.max_steps"]
    fit(config, tmp_path, "--trainer.default_root_dir", str(root), *again, "3")
    before = files(root)

    def refused(message: str, *options: str, verb: str = "fit") -> None:
        run = Run.start(tmp_path / message, [verb, *command(config, root, *options)[1:]])
        assert run.wait() == [2] and message in run.log() and "Traceback" not in run.log(), run.log()
        now = files(root)
        kept = {name: digest for name, digest in before.items() if Path(name).name not in (".lock", "config.yaml")}
        assert {name: now[name] for name in kept} == kept and not list(root.rglob(".*.tmp"))

    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    refused("Read-only file system", *again, "6")
    refused("cannot be made: Read-only file system")
    last = str(root / "mine/checkpoints/last.ckpt")
    refused("an evaluation keeps its scores and logs there", "--ckpt_path", last, verb="validate")
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    with (small / "fill").open("wb", buffering=0) as fill, pytest.raises(OSError, match="No space left"):
        while fill.write(bytes(1 << 12)):
            pass
    refused("No space left on device", *again, "6")
    (small / "fill").unlink()
    fit(config, tmp_path, "--trainer.default_root_dir", str(root), *again, "6")
    assert load(root / "mine/checkpoints/last.ckpt")["global_step"] == 6
