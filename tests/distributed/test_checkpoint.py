"""Checkpoint files: written whole or not at all, checked before use."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from talklora_pl.adapter.files import FORMAT_VERSION
from talklora_pl.distributed.checkpoint import (
    KEY,
    DurableCheckpointIO,
    last_checkpoint,
    read_checkpoint,
    refuse_differences,
)
from talklora_pl.errors import UserError
from tests.distributed.runs import SERVER, Run, load


def content(numbers: int = 1000) -> dict[str, Any]:
    return {
        "state_dict": {"w": torch.arange(float(numbers))},
        "loops": {},
        "pytorch-lightning_version": "2.6.6",
        KEY: {"format_version": FORMAT_VERSION},
    }


def save(path: Path, numbers: int = 1000) -> None:
    DurableCheckpointIO().save_checkpoint(content(numbers), path)


def test_round_trip_mode_and_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.ckpt"
    before = os.umask(0o027)
    try:
        save(path)
        save(path, 2000)
    finally:
        os.umask(before)
    assert torch.equal(DurableCheckpointIO().load_checkpoint(path)["state_dict"]["w"], torch.arange(2000.0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_dead_writers_file_is_removed_a_living_ones_not(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = os.uname().nodename
    gone, alive = (tmp_path / f".x.ckpt.{host}.{pid}.tmp" for pid in (dead.pid, os.getppid()))
    gone.touch()
    alive.touch()
    save(tmp_path / "last.ckpt")
    assert not gone.exists() and alive.exists()


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 0x10
    path.write_bytes(bytes(data))


MANGLED = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "cut by a byte": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "one bit in a tensor": lambda p: flip(p, 0.5),
    "text": lambda p: p.write_text("hello"),
    "pickle": lambda p: p.write_bytes(pickle.dumps({"state_dict": {}})),
    "zip": lambda p: zipfile.ZipFile(p, "w").close(),
    "weights only": lambda p: torch.save({"w": torch.zeros(2)}, p),
    "another program's": lambda p: torch.save({**content(), KEY: None}, p),
    "half of one": lambda p: torch.save({**content(), "loops": None}, p),
    "older": lambda p: torch.save({**content(), KEY: {"format_version": 0}}, p),
    "newer": lambda p: torch.save({**content(), KEY: {"format_version": 99}}, p),
    "code": lambda p: torch.save({**content(), "x": Path("x")}, p),
    "missing": lambda p: p.unlink(),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("how", MANGLED)
def test_mangled_files_are_named(tmp_path: Path, how: str) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    save(tmp_path / "best.ckpt")
    MANGLED[how](path)
    with pytest.raises(UserError, match=r"(?s)last\.ckpt.*best\.ckpt") as e:
        read_checkpoint(path)
    assert "weights_only" not in str(e.value)


def test_differences_are_listed() -> None:
    saved = {"adapter": {"router": {"name": "top_k", "k": 2}, "rank": 8}, "gone": 1}
    refuse_differences(saved, {"adapter": {"router": {"name": "top_k", "k": 2}, "rank": 8}, "gone": 1}, "x")
    with pytest.raises(UserError) as e:
        refuse_differences(saved, {"adapter": {"router": {"name": "top_k", "k": 1}, "rank": 8}}, "x")
    assert "adapter.router.k: 2 in the checkpoint, 1 in this run" in str(e.value) and "gone" in str(e.value)
    assert "rank" not in str(e.value)


def test_last_is_the_newest_of_all_runs(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for i in (0, 1):
        path = tmp_path / f"version_{i}" / "checkpoints" / "last.ckpt"
        save(path)
        os.utime(path, (i, i))
    assert last_checkpoint(tmp_path) == path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_keeps_the_previous_one_and_says_so(small_disk: Path) -> None:
    path = small_disk / "last.ckpt"
    save(path, 10_000)
    for _ in range(2):
        with pytest.raises(UserError, match=r"last\.ckpt.*No space left.*untouched"):
            save(path, 200_000)
        assert os.listdir(small_disk) == ["last.ckpt"]
    assert len(read_checkpoint(path)["state_dict"]["w"]) == 10_000


def _write_forever(path: Path) -> None:
    for n in range(10_000):
        save(path, 200_000 + n)


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL at 30 moments of a process that does nothing but write: always a whole file, however $TMPDIR is set."""
    import random
    import time

    path, draw = tmp_path / "last.ckpt", random.Random(0)
    save(path)
    for _ in range(30):
        p = SERVER.Process(target=_write_forever, args=(path,))
        p.start()
        time.sleep(0.02 + draw.random() * 0.15)
        p.kill()
        p.join()
        read_checkpoint(path)
    save(path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.slow
def test_a_run_on_a_full_disk(config: Path, tmp_path: Path, small_disk: Path) -> None:
    """The run ends with status 2 and a message; what was saved before can be resumed elsewhere."""
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "log")]
    argv += ["--checkpoint.dirpath", str(small_disk / "checkpoints"), "--checkpoint.every_n_train_steps", "2"]
    argv += ["--trainer.val_check_interval", "2"]
    first = Run.start(tmp_path, [*argv, "--trainer.max_steps", "2"])
    assert first.wait() == [0], first.log()
    last = small_disk / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - 4096))
    second = Run.start(tmp_path, [*argv, "--ckpt_path", str(last)])
    assert second.wait() == [2]
    assert "No space left" in second.log() and "Traceback" not in second.log()
    assert last.read_bytes() == before
    filler.unlink()
    third = Run.start(tmp_path, [*argv, "--ckpt_path", str(last)])
    assert third.wait() == [0], third.log()
    assert load(last)["global_step"] == 8
