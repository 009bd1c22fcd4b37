"""Rows that are learned and scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from talklora_pl.cache import cached_folder
from talklora_pl.data.example import Example
from talklora_pl.data.table import column

if TYPE_CHECKING:
    import datasets

    from talklora_pl.data.rows import RowReader
    from talklora_pl.data.source import Reader


def digest(example: Example) -> int:
    """64 bits of what is asked and answered, without regard to case and white space."""
    said = [example.prompt, example.input, example.pair, *example.answers]
    if example.messages:
        said.append(json.dumps(example.messages, ensure_ascii=False, sort_keys=True, default=str))
    text = "\0".join([" ".join(part.split()) for part in said]).casefold()
    made = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(made, "little", signed=True)


def digests(table: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """All digests of a table, and of each the row that it is in (a packed row has several)."""
    import pyarrow.compute as pc

    lists = column(table, "digests")
    return pc.list_flatten(lists).to_numpy(), pc.list_parent_indices(lists).to_numpy()


def leaked(train: datasets.Dataset, scored: np.ndarray) -> np.ndarray:
    """Indices of the training rows that are among the scored ones."""
    found, row = digests(train)
    return np.unique(row[np.isin(found, scored)])


def digests_of(rows: Reader, read: RowReader, code: str, cache: Path | None) -> np.ndarray:
    """Digests of rows that are not prepared yet; what is wrong with them is for those to say that prepare them."""
    from talklora_pl.data.source import BadRow

    def every() -> Iterator[int]:
        for _, row in islice(rows, rows.source.limit):
            if isinstance(row, dict):
                try:
                    yield digest(read(row))
                except BadRow:
                    continue

    def write(folder: Path) -> None:
        np.save(folder / "digests.npy", np.fromiter(every(), np.int64))

    recipe = [
        1,
        asdict(replace(rows.source, weight=None)),
        rows.identity,
        code,
        read.classes,
        read.num_classes,
        read.trained,
    ]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]
    return np.load(cached_folder("digests", key, write, cache, verify=True) / "digests.npy")  # type: ignore[no-any-return]
