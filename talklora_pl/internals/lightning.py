"""Lightning: names that it does not promise to keep."""

from __future__ import annotations

import traceback

# --- command line


def raised_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself refused something, as opposed to what it called.

    It refuses most options by a ValueError once the data are there (`val_check_interval` above the number of batches),
    and so does a plugin that is broken, whose traceback is wanted.
    """
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("lightning.")
