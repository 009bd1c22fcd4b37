"""What is shown while rows are prepared: a bar on a terminal; a line at the beginning and the end elsewhere."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from rich import progress
from rich.console import Console

QUICK = 5.0  # seconds; what takes less is not worth a line


class Progress:
    """A context in which rows are prepared.

    Args:
        name: of their source.
        total: how many there are, where that is known.
    """

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total, self.rows, self.begun = str(name), total, 0, time.monotonic()
        console = Console(stderr=True)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("rows"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(f"prepare {self.name}", total=total)
        self.said = False

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def add(self, rows: int) -> None:
        """So many more are done."""
        self.rows += rows
        self.bar.advance(self.task, rows)
        if not self.said and self.bar.disable and self.total and self.total > 2 * self.rows:
            self.said = True
            rank_zero_info(f"Preparing {self.name}: {self.total:,} rows, once; they are kept for later runs")

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.bar.stop()
        seconds = time.monotonic() - self.begun
        if kind is None and (self.said or seconds > QUICK):
            rate = self.rows / max(seconds, 1e-3)
            rank_zero_info(f"Prepared {self.name}: {self.rows:,} rows in {seconds:.0f} s ({rate:,.0f} rows/s)")
