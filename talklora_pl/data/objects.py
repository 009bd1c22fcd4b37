"""Rows that are Python objects, in the place of a path."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

from talklora_pl.errors import UserError
from talklora_pl.internals.datasets import content_digest

if TYPE_CHECKING:
    PathOrRows = str | os.PathLike[str] | Iterable[Any]
else:
    PathOrRows = str  # what a config can say


class RowsInPython(str):
    """Rows that are Python objects, in the place of a path; as text it is what messages call them.

    Raises:
        UserError: they are no rows.
    """

    def __new__(cls, rows: Any) -> RowsInPython:
        kind = type(rows).__name__
        if isinstance(rows, Mapping):
            what = "names its splits: give one, such as data['train']" if _splits(rows) else "is one row: give a list"
            raise UserError(f"data: a {kind} {what}.")
        if isinstance(rows, bytes) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
            raise UserError(
                f"data: {kind} is not what data can be: a path or hub name, a Source, a list of dicts, a "
                "datasets.Dataset or IterableDataset, a pandas DataFrame, or a list of these."
            )
        new = super().__new__(cls, f"{len(rows)} rows in Python" if isinstance(rows, Sized) else f"{kind} in Python")
        new.given, new._read = rows, None  # type: ignore[attr-defined]
        return new

    given: Any
    _read: tuple[Any, str] | None

    def __getnewargs__(self) -> tuple[Any]:  # type: ignore[override]
        return (self.given,)

    def __deepcopy__(self, memo: Any) -> RowsInPython:
        return self

    def read(self, limit: int | None) -> tuple[Any, str]:
        """The rows, read once, and a digest of their content."""
        import datasets

        if self._read is None:
            rows = self.given
            if isinstance(rows, datasets.Dataset):
                self._read = rows.with_format(None), content_digest(rows)
                return self._read
            if hasattr(rows, "to_dict") and hasattr(rows, "notna"):  # pandas
                rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
            elif not hasattr(rows, "__iter__"):  # of PyTorch
                rows = map(rows.__getitem__, range(len(rows)))
            rows = [_plain(row) for row in islice(rows, limit)]
            digest = hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()
            self._read = rows, digest
        return self._read


def _splits(rows: Mapping[Any, Any]) -> bool:
    return any(hasattr(value, "features") for value in rows.values())


def _plain(value: Any) -> Any:
    """Lists, dicts and numbers of Python in place of those of NumPy and PyTorch."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
