"""From the prepared sources to the tables of a stage: sources joined, validation split off, leaks found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from talklora_pl.data.leaks import digests, leaked
from talklora_pl.data.prepare import Prepared
from talklora_pl.errors import UserError

if TYPE_CHECKING:
    import datasets


@dataclass
class Assembled:
    """The tables of a stage.

    Attributes:
        tables: by the name of the option that they are from: `train`, `val`, `test`, `predict`.
        source_of: of each training row, the number of its source.
        leaks: lines about training rows that stand in other data too.
    """

    tables: dict[str, datasets.Dataset]
    source_of: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    leaks: list[str] = field(default_factory=list)

    def keep(self, rows: np.ndarray) -> None:
        """Leave out all other training rows."""
        self.tables["train"], self.source_of = self.tables["train"].select(rows), self.source_of[rows]


def assemble(
    done: Mapping[str, list[Prepared]], val_size: float, seed: int, on_leak: str, scored_later: np.ndarray
) -> Assembled:
    """The tables of a stage.

    Args:
        done: its prepared sources.
        val_size: rows, or their share, to split off for validation if there are no validation data.
        seed: of the split.
        on_leak: `drop` leaves training rows out that stand in other data too, `error` raises.
        scored_later: digests of the rows to test on.

    Raises:
        UserError: rows stand in training and other data, and that is an error or leaves none to train on.
    """
    import datasets

    out = Assembled(
        {name: datasets.concatenate_datasets([part.table for part in parts]) for name, parts in done.items() if parts}
    )
    tables = out.tables
    if "train" not in tables:
        return out
    out.source_of = np.repeat(np.arange(len(done["train"])), [len(part.table) for part in done["train"]])
    if "val" not in tables:
        kept, held_out = split(len(tables["train"]), val_size, seed)
        tables["val"] = tables["train"].select(held_out)
        out.keep(kept)
    others = {"data.val": digests(tables["val"])[0], "data.test": scored_later}
    found = {name: leaked(tables["train"], other) for name, other in others.items()}
    out.leaks = [
        f"{len(rows)} of {len(tables['train'])} training rows stand in {name} too, such as "
        f"{tables['train'][int(rows[0])]['id']!r}"
        for name, rows in found.items()
        if len(rows)
    ]
    if out.leaks and on_leak == "error":
        raise UserError("\n".join(f"data.on_leak: {line}." for line in out.leaks))
    if out.leaks and on_leak == "drop":
        kept = np.setdiff1d(np.arange(len(tables["train"])), np.concatenate([*found.values()]))
        if not len(kept):
            raise UserError("data.on_leak: drop leaves no row to train on: all of them stand in other data too.")
        out.keep(kept)
    return out


def held_out(rows: int, val_size: float) -> int:
    """How many of the training rows are for validation. Raises UserError: all of them."""
    count = round(val_size * rows) if val_size < 1 else int(val_size)
    if count >= rows:
        raise UserError(f"data.val_size: {count} rows for validation leave none of {rows} to train on.")
    return count


def split(rows: int, val_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows to train on, and of those for validation."""
    count = held_out(rows, val_size)
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[count:]), np.sort(order[:count])
