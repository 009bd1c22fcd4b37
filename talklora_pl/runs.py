"""Runs on disk: each has a folder of its own, a lock while it is written to, and a record of what it is.

Free of torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talklora_pl.durable import write_whole
from talklora_pl.errors import UserError

RUNS = "runs"
"""Where runs are kept unless ``--trainer.default_root_dir`` says otherwise."""

RECORD, LOCK = "run.json", ".lock"

_held: set[int] = set()
"""Descriptors of locks. A forked process has them too, and would keep the lock after this one is killed."""


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class Run:
    """The folder of one run."""

    folder: Path

    @property
    def name(self) -> str:
        """What ``--run_name`` calls it."""
        return self.folder.name

    @property
    def record(self) -> dict[str, Any]:
        """What the fit has written of itself; nothing for a run of version 0.1."""
        try:
            found = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return Path(self.record.get("checkpoints") or self.folder / "checkpoints")

    def folders(self) -> set[str]:
        """Where it keeps checkpoints and adapters, if not in its own folder."""
        return {str(place) for name in ("checkpoints", "adapters") if (place := self.record.get(name))}

    @property
    def state(self) -> str:
        """``running``, ``finished``, ``stopped`` or ``failed`` with the step; ``unknown`` without a record."""
        record = self.record
        state = record.get("state", "unknown")
        if state == "running" and not self.live():
            state = "failed"  # killed before it could say so
        return state if state in ("unknown", "finished") else f"{state} at step {record.get('step', 0)}"

    def write(self, **values: Any) -> None:
        """Change entries of the record, all of them or none; where somebody removed the folder, it is made again."""
        if not self.folder.is_dir():
            warnings.warn(f"{self.folder} was removed while its run was at work; it is written anew.", stacklevel=2)
            self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record | values, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.folder / RECORD, lambda part: part.write_text(text, encoding="utf-8"))

    def newest(self, name: str = "last") -> Path | None:
        """Its checkpoint of that name."""
        return newest(self.checkpoints, name)

    # --- the lock

    def holder(self) -> str | None:
        """Which process writes to it, ``process 123 on node7``, or None."""
        try:
            descriptor = os.open(self.folder / LOCK, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as e:
            return os.read(descriptor, 200).decode() or "another process" if e.errno in _TAKEN else None
        finally:
            os.close(descriptor)
        return None

    def live(self) -> bool:
        """Whether a process writes to it now."""
        return self.holder() is not None

    def refuse_live(self) -> None:
        """Raise a UserError while another process writes to it."""
        if holder := self.holder():
            raise UserError(
                f"The run {self.folder} is still going on: {holder}. Stop it first (Ctrl-C and SIGTERM save), or start "
                "a new run beside it: without --ckpt_path, or with --run_name NAME."
            )

    def lock(self) -> int:
        """Take the lock; it is free again when this process ends, however it ends.

        Raises:
            UserError: another process has it, or nothing can be written there.
        """
        try:
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise UserError(f"The run {self.folder} cannot be written to: {e.strerror}.") from None
        for _ in range(20):  # somebody may just be looking
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if e.errno not in _TAKEN:
                    break  # this file system has no locks
                time.sleep(0.05)
        else:
            os.close(descriptor)
            self.refuse_live()
            raise UserError(f"The run {self.folder} was taken by another process at this moment.")
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # a full disk: it is locked all the same
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _held.add(descriptor)
        return descriptor

    def unlock(self, descriptor: int) -> None:
        """Give the lock back."""
        if descriptor in _held:
            _held.remove(descriptor)
            os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def abandon(self) -> None:
        """Remove a new run that came to nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)


_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


def new_run(root: Path, name: str | None = None) -> Run:
    """A folder that no other process has or gets: `name`, or the next ``version_N``.

    Raises:
        UserError: there is one of that name, or it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            folder = root / (name or f"version_{_next_version(root)}")
            try:
                folder.mkdir()
                return Run(folder)
            except FileExistsError:
                if name:
                    raise UserError(f"--run_name {name}: there is {folder} already.") from None
    except OSError as e:
        raise UserError(f"trainer.default_root_dir: {root} cannot be made: {e.strerror}.") from None


def _next_version(root: Path) -> int:
    numbers = [p.name.removeprefix("version_") for p in root.glob("version_*")]
    return max((int(n) for n in numbers if n.isdigit()), default=-1) + 1


def all_runs(root: str | os.PathLike[str]) -> list[Run]:
    """The runs below `root`, oldest first."""
    found = {p.parent for p in Path(root).glob(f"**/{RECORD}")}
    found |= {p.parent.parent for p in Path(root).glob("**/checkpoints/*.ckpt")}
    return sorted(map(Run, found), key=lambda r: (r.record.get("started") or r.folder.stat().st_mtime, r.name))


def run_of(checkpoint: str | os.PathLike[str], root: str | os.PathLike[str]) -> Run | None:
    """The run below `root` that a checkpoint belongs to."""
    place = Path(checkpoint).absolute().parent
    return next((r for r in all_runs(root) if r.folder != Path(root) and r.checkpoints.absolute() == place), None)


def newest(folder: Path, name: str) -> Path | None:
    """The file ``name*.ckpt`` in a folder that was written last."""
    files = [p for p in folder.glob(f"{name}*.ckpt") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_mtime, default=None)


def to_go_on(root: str | os.PathLike[str], name: str = "last", job: str | None = None) -> Run | None:
    """The one run below `root` that a fit can go on with, or None.

    The one of this SLURM job; else the one that has not ended; else the only one.

    Args:
        name: of the checkpoint that it must have.
        job: id of the SLURM job of this process.

    Raises:
        UserError: there are several, or it is still going on.
    """
    runs = [r for r in all_runs(root) if r.newest(name)]
    if job and (own := [r for r in runs if r.record.get("job") == job]):
        runs = own[-1:]
    ended = [r for r in runs if r.state == "finished"]
    waiting = [r for r in runs if r not in ended and not r.live()]
    for several in (waiting, [r for r in runs if r not in ended], ended):
        if len(several) > 1:
            lines = "\n".join(f"  {r.name}: " + f"{r.record.get('method') or ''} {r.state}".strip() for r in several)
            raise UserError(f"--ckpt_path {name} could mean several runs in {root}:\n{lines}\nSay --run_name NAME.")
        if several:
            several[0].refuse_live()
            return several[0]
    return None
