"""Files and folders that appear whole or not at all, whatever happens while they are written.

They are written beside their place, in the *same* directory (a rename across file systems is a copy), under a name that
tells the process, flushed to disk, and renamed at the end.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import threading
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
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    except OSError as e:
        if e.errno and not e.filename:  # a failed write does not say where
            e.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


_at_work: set[Path] = set()  # of this process, in which two may fill the same folder


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to fill; it is removed at the end unless it was renamed."""
    names = (path.name, *(f"{path.name}.{i}" for i in range(1, 1000)))
    work = next(w for w in (beside(path.with_name(name)) for name in names) if w not in _at_work)
    _at_work.add(work)
    shutil.rmtree(work, ignore_errors=True)  # of a killed process that had this one's id
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _at_work.discard(work)


def put(work: Path, target: Path) -> None:
    """Flush a folder with all that is in it to disk, and give it its name, at which there is nothing yet.

    Raises:
        OSError: another process has put one there, or it cannot be written.
    """
    for folder, _, files in os.walk(work):
        for name in files:
            _flush(Path(folder, name))
        _flush(Path(folder))
    work.rename(target)
    _flush(target.parent)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What keeps a program from writing and is no fault of it: a full disk, a quota, a limit, no permission, a bad disk."""


def no_room(error: BaseException | None) -> OSError | None:
    """The failed write behind an error, if there is one: torch and libraries in Rust (safetensors, tokenizers) raise
    errors of their own for it."""
    seen: list[BaseException] = []  # one that is raised again and again may lead back to itself
    while error is not None and error not in seen:
        seen.append(error)
        number = error.errno if isinstance(error, OSError) else None
        if said := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(said[1])
        if number in NO_ROOM:
            return error if isinstance(error, OSError) else OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def in_a_line(error: OSError) -> str:
    """A failed write in one line, with the file if it is known."""
    where = f"{os.fsdecode(error.filename)}: " if error.filename else "A file could not be written: "
    return f"{where}{error.strerror}."


def failed_write(error: Exception) -> str | None:
    """What to say of an error that is a failed write; None: it is another."""
    cause = no_room(error) if isinstance(error, OSError) or "os error" in str(error) else None
    return None if cause is None else f"{in_a_line(cause)} What was whole before is as it was."


@contextmanager
def in_short() -> Iterator[None]:
    """Inside of it a failed write in a thread, such as that of TensorBoard, is said in one line; whoever waits for the
    thread has an error of his own to raise."""
    before = threading.excepthook

    def say(args: threading.ExceptHookArgs) -> None:
        cause = no_room(args.exc_value)
        if cause is None:
            before(args)
        else:
            print(f"Warning: {in_a_line(cause)}", file=sys.stderr)

    threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = before


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
    """Whether a process of this number runs on this machine. One that has ended may still have its number, until its
    parent asks how it ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):  # no Linux, or gone meanwhile
        return not Path("/proc/self").exists()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
