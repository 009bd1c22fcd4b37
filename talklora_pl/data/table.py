"""The table of prepared rows: its columns, how it is written, and how a column of it is read without its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pyarrow


@cache
def features() -> datasets.Features:
    """For the meaning of the columns see :class:`~talklora_pl.data.prepare.Prepared`."""
    from datasets import Features, Value

    ids = [[Value("int32")]]
    return Features(
        {
            "id": Value("string"),
            "task": Value("string"),
            "input_ids": ids,
            "labels": ids,
            "token_type_ids": [Value("int32")],
            "label": Value("int32"),
            "prompt_length": Value("int32"),
            "answers": [Value("string")],
            "length": Value("int32"),
            "loss_tokens": Value("int32"),
            "digests": [Value("int64")],
        }
    )


def to_arrow(rows: list[dict[str, Any]], features: datasets.Features) -> bytes:
    """Rows as a stream of Arrow: what one process hands to another."""
    import pyarrow as pa

    sink, schema = pa.BufferOutputStream(), features.arrow_schema
    with pa.ipc.new_stream(sink, schema) as stream:
        if rows:
            stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return sink.getvalue().to_pybytes()


def from_arrow(stream: bytes) -> list[dict[str, Any]]:
    """The rows again."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = pa.ipc.open_stream(stream).read_all().to_pylist()
    return rows


@contextmanager
def write_table(path: Path, features: datasets.Features) -> Iterator[Callable[[bytes], None]]:
    """Gives a function that adds rows, as :func:`to_arrow` makes them, to a file that ``Dataset.from_file`` reads."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as out:

        def write(stream: bytes) -> None:
            for batch in pa.ipc.open_stream(stream):
                out.write_batch(batch)

        yield write


def column(table: datasets.Dataset, name: str) -> pyarrow.ChunkedArray:
    """One column, in the order of the table; through Python it would take a minute for half a million rows."""
    return table.select_columns([name]).with_format("arrow")[:].column(name)  # type: ignore[no-any-return, call-overload]


def numbers(table: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers."""
    return column(table, name).to_numpy()  # type: ignore[no-any-return]


def tasks(table: datasets.Dataset) -> list[str]:
    """The different tasks, sorted."""
    return sorted(column(table, "task").unique().to_pylist())  # type: ignore[type-var]
