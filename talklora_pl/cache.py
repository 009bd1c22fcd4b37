"""Work that is done once: a folder in the user's cache, named by what it was made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from talklora_pl.durable import folder_beside, put


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/talklora_pl``, or ``~/.cache/talklora_pl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "talklora_pl"


def sha256(path: Path) -> str:
    """Digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def cached_folder(kind: str, key: str, write: Callable[[Path], None], root: Path | None = None) -> Path:
    """The folder ``root/kind/key``; where it is absent, ``write(folder)`` fills it first.

    It is written beside its final place and then renamed, so that nobody ever sees half of it: neither after a kill nor
    from another process at work on the same folder.
    """
    final = (root or cache_root()) / kind / key
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(final) as work:
        write(work)
        try:
            put(work, final)
        except OSError:  # another process was first: its folder holds the same
            if not final.is_dir():
                raise
    return final
