"""Work that is done once: a folder in the user's cache, named by what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from talklora_pl.durable import folder_beside, put

MARK = "complete.json"  # file -> size, time of writing (ns) and digest; written last, so a folder without it is torn


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/talklora_pl``, or ``~/.cache/talklora_pl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "talklora_pl"


in_full = False
"""Compare digests of all that is cached, also of what is large (``--verify``)."""

_digests: dict[tuple[Any, ...], str] = {}


def sha256(path: Path) -> str:
    """Digest of a file's content; read once by a process, unless the file changes."""
    stat = path.stat()
    key = (str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def cached_folder(
    kind: str, key: str, write: Callable[[Path], None], root: Path | None = None, verify: bool = False
) -> Path:
    """The folder ``root/kind/key``; where it is absent or damaged, ``write(folder)`` fills it first.

    It is written beside its final place, flushed to disk and then renamed, so that nobody ever sees half of it: neither
    after a kill or a power failure nor from another process at work on the same folder.

    Args:
        kind: the folder of all that are of its kind.
        key: what it is made from.
        write: fills it.
        root: None: :func:`cache_root`.
        verify: compare the digest of every file, and not only that of those whose time is another one.
    """
    verify = verify or in_full
    final = (root or cache_root()) / kind / key
    if final.is_dir():
        if not (damage := _damage(final, verify)):
            return final
        from lightning.pytorch.utilities import rank_zero_warn  # slow to import

        rank_zero_warn(f"{final}: {damage}; it is made anew.")
    final.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(final) as work:
        write(work)
        files = sorted(file for file in work.rglob("*") if file.is_file())
        state = {str(f.relative_to(work)): [f.stat().st_size, f.stat().st_mtime_ns, sha256(f)] for f in files}
        (work / MARK).write_text(json.dumps(state))
        with folder_beside(final.with_name(final.name + ".damaged")) as old:
            if final.is_dir() and _damage(final, verify):
                final.rename(old / "entry")
            try:
                put(work, final)
            except OSError:  # another process was first: its folder holds the same
                if not final.is_dir():
                    raise
    return final


def _damage(folder: Path, verify: bool) -> str:
    """What is wrong with a folder of the cache; nothing where it is whole."""
    try:
        state = json.loads((folder / MARK).read_text())
        for name, (size, time, digest) in state.items():
            stat = (folder / name).stat()
            if stat.st_size != size:
                return f"{name} was cut or changed"
            if (verify or stat.st_mtime_ns != time) and sha256(folder / name) != digest:
                return f"{name} was changed"
    except (OSError, ValueError, AttributeError, TypeError):
        return "was not finished, or is of an earlier version"
    return ""
