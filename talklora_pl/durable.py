"""Files and folders that appear whole or not at all, whatever happens while they are written.

They are written beside their place, in the *same* directory (a rename across file systems is a copy), under a name that
tells the process, and renamed at the end.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file, flush it to disk and put it at ``path``, in place of what was there.

    The file gets the mode that the user's umask gives new files. After an error the file from before is intact.
    """
    part = beside(path)
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors makes its files readable by the owner alone
        flush(part)
        part.replace(path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to fill; it is removed at the end unless it was renamed."""
    work = beside(path)
    shutil.rmtree(work, ignore_errors=True)  # of a killed process that had this one's id
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def beside(path: Path) -> Path:
    """Where this process writes what will be at ``path``."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_leftovers(directory: Path) -> None:
    """Delete the unfinished files of processes of this machine that were killed while writing into ``directory``."""
    for file in directory.glob(f".*.{socket.gethostname()}.*.tmp"):
        process = re.search(r"\.(\d+)\.tmp$", file.name)
        if process and file.is_file() and not alive(int(process[1])):
            file.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def flush(path: Path) -> None:
    """Let a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
