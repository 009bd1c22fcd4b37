"""Whole or not at all, with the user's file mode, and nothing left beside it."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from talklora_pl.durable import alive, beside, folder_beside, in_short, no_room, put, write_whole


def test_a_failed_write_leaves_the_file_from_before(tmp_path: Path) -> None:
    place = tmp_path / "file"
    write_whole(place, lambda part: part.write_text("first"))

    def fail(part: Path) -> None:
        part.write_text("hal")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(place, fail)
    assert place.read_text() == "first" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_and_folders_have_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        # safetensors by itself writes files that only their owner reads
        write_whole(tmp_path / "file", lambda part: save_file({"x": torch.zeros(1)}, part))
        with folder_beside(tmp_path / "folder") as work:
            work.rename(tmp_path / "folder")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_folder_that_was_not_put_in_place_is_gone(tmp_path: Path) -> None:
    beside(tmp_path / "folder").mkdir()  # of a killed process of the same number
    with pytest.raises(ValueError), folder_beside(tmp_path / "folder") as work:
        (work / "half").touch()
        raise ValueError
    assert not os.listdir(tmp_path)


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr("talklora_pl.durable._flush", lambda path: flushed.append(path.name) or path.exists())
    with folder_beside(tmp_path / "folder") as work:
        (work / "in").mkdir()
        (work / "in/file").touch()
        put(work, tmp_path / "folder")
        assert set(flushed[:-1]) == {"file", "in", work.name} and flushed[-1] == tmp_path.name
    assert (tmp_path / "folder/in/file").exists()


def test_a_process_that_nobody_has_asked_for_is_dead() -> None:
    assert alive(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still in the table
    os.kill(child.pid, 0)
    assert not alive(child.pid)
    child.wait()
    assert not alive(child.pid)


def _full() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))


FULL = """
import signal, sys
from pathlib import Path
from talklora_pl.durable import no_room
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def plain(path): path.write_bytes(bytes(1 << 14))
def safetensors(path):
    import torch; from safetensors.torch import save_file
    save_file({"x": torch.zeros(1 << 14)}, path)
def torch_(path):
    import torch; torch.save({"x": torch.zeros(1 << 14)}, path.open("wb"))
def tokenizers(path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({str(i): i for i in range(2000)}, unk_token="0")).save(str(path))
for write in (plain, safetensors, torch_, tokenizers):
    try:
        write(Path(sys.argv[1]) / "file")
    except Exception as e:
        print(write.__name__, no_room(e).strerror)
"""


def test_a_failed_write_is_known_whoever_wrote(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], preexec_fn=_full, capture_output=True, text=True)
    names = ("plain", "safetensors", "torch_", "tokenizers")
    assert done.stdout.splitlines() == [f"{name} {os.strerror(errno.EFBIG)}" for name in names], done.stderr
    circle = ValueError("no")
    circle.__context__ = KeyError()
    circle.__context__.__context__ = circle
    assert no_room(circle) is None and no_room(FileNotFoundError(errno.ENOENT, "no")) is None


def test_a_write_that_fails_in_a_thread_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """TensorBoard writes in a thread, and names its files in bytes."""

    def write(number: int) -> None:
        raise OSError(number, os.strerror(number), b"/full/events")

    others: list[Any] = []
    before, threading.excepthook = threading.excepthook, others.append
    try:
        with in_short():
            for number in (errno.ENOSPC, errno.ENOENT):
                thread = threading.Thread(target=write, args=(number,))
                thread.start()
                thread.join()
        assert threading.excepthook == others.append
    finally:
        threading.excepthook = before
    assert capsys.readouterr().err == "Warning: /full/events: No space left on device.\n"
    assert [type(args.exc_value) for args in others] == [FileNotFoundError]
