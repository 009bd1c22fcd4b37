"""What a run says of its prepared data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl.data.mixture import counts
from talklora_pl.data.prepare import Prepared
from talklora_pl.data.rows import listing
from talklora_pl.data.source import BadRow
from talklora_pl.data.table import tasks
from talklora_pl.errors import UserError
from talklora_pl.paths import expand


def say_rows(done: Mapping[str, list[Prepared]]) -> None:
    """How many rows each source has, and what was cut, left out or replaced in them."""
    for name, parts in done.items():
        for part in parts:
            cut = f", {part.cut_rows} prompts cut by {part.cut_tokens} tokens in all" if part.cut_rows else ""
            texts = f" from {part.documents} texts" if part.documents else ""
            rank_zero_info(f"data.{name}: {', '.join(tasks(part.table))}: {len(part.table)} rows{texts}{cut}")
            for notice, count in part.notices.items():
                rank_zero_info(f"Warning: {part.source.path}: {notice} ({count} row{'s' if count > 1 else ''})")


def say_split(rows: int, held_out: int) -> None:
    """How many of the training rows are for validation."""
    rank_zero_info(f"data.val_size: {held_out} of these {rows} rows validate, {rows - held_out} train")


def say_classes(names: list[str]) -> None:
    """Classes that were found in the training data."""
    rank_zero_info(f"data.labels: {len(names)} classes: {listing(names)}")


def say_bad_rows(done: Mapping[str, list[Prepared]], path: str) -> None:
    """Write the rows that were left out to a JSON Lines file, and say so.

    Raises:
        UserError: it cannot be written.
    """
    bad: list[BadRow] = [row for parts in done.values() for part in parts for row in part.bad]
    if not bad:
        return
    report = Path(expand(path))
    entries = [{"file": b.file, "place": b.where, "column": b.column, "problem": b.problem} for b in bad]
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), "utf-8")
    except OSError as e:
        raise UserError(f"data.bad_row_report: {report} cannot be written: {e.strerror}.") from e
    what = "1 bad row was left out; it is" if len(bad) == 1 else f"{len(bad)} bad rows were left out; they are"
    # not as a Python warning: that would print a line of our source beneath it
    rank_zero_info(f"Warning: {what} listed in {report}. The first: {bad[0]}")


def say_leaks(lines: list[str], dropped: bool) -> None:
    """Training rows that stand in other data too."""
    what = "they are dropped" if dropped else "scores on them say little (data.on_leak)"
    for line in lines:
        rank_zero_info(f"Warning: {line}; {what}")


def say_shares(parts: list[Prepared], sizes: list[int], share: np.ndarray) -> None:
    """How many rows of each source are in an epoch.

    Args:
        parts: the sources.
        sizes: how many rows each has to train on.
        share: which part of an epoch each is to have.
    """
    for part, has, gives in zip(parts, sizes, counts(sum(sizes), share)):
        rank_zero_info(
            f"data.train: {', '.join(tasks(part.table))}: {gives / sum(sizes):.1%} of an epoch: "
            f"{gives} rows of the {has} that it has"
        )
