"""Paths as a user writes them, in a config, on the command line or in Python."""

from __future__ import annotations

import os
import re

from talklora_pl.errors import UserError


def expand(path: str | os.PathLike[str]) -> str:
    """A path with ``~`` and ``$VARIABLE`` replaced; every option that is a path of this machine goes through here.

    Raises:
        UserError: the environment has no such variable (and there is no file with that very name).
    """
    full = os.path.expanduser(os.path.expandvars(path))  # not pathlib's, which fails where there is no such user
    if (left := re.search(r"\$\w+|\$\{\w+\}", full)) and not os.path.exists(full):
        raise UserError(f"{os.fspath(path)}: the environment variable {left[0]} is not set.")
    return full
