"""Where rows come from: local JSON Lines, JSON, CSV, TSV and Parquet files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talklora_pl.cache import sha256
from talklora_pl.errors import UserError
from talklora_pl.internals.datasets import content_digest

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass
class Source:
    """One data set of one task.

    Attributes:
        path: a file (by its ending: .jsonl, .json, .csv, .tsv, .parquet; ``$VARIABLES`` and ``~`` are expanded), or a
            folder or hub name that ``datasets.load_dataset`` takes.
        task: name under which its scores and its routing appear. None: each row's own `task`, or the file's name.
        rows: what a row is, see :mod:`talklora_pl.data.rows`. None: the data module's ``rows``.
        format: how a row is written as text, see :mod:`talklora_pl.data.formats`. None: the data module's ``format``.
        columns: field -> the column (or ``outer.inner``, or a list of columns) that holds it, where the names differ.
        name: configuration of a hub data set.
        split: split of a hub data set.
        revision: branch, tag or commit of a hub data set.
        limit: use the first so many rows only.
    """

    path: str
    task: str | None = None
    rows: str | None = None
    format: str | None = None
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: int | None = None

    @property
    def task_name(self) -> str:
        return self.task or re.sub(r"\W+", "_", Path(self.path).stem).strip("_") or "data"


@dataclass
class BadRow(Exception):
    """What is wrong with one row, and where."""

    problem: str
    column: str | None = None
    where: str = ""
    file: str = ""

    def __str__(self) -> str:
        column = f", column {self.column!r}" if self.column else ""
        return f"{self.file}, {self.where}{column}: {self.problem}"


def _expand(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))


def check_path(source: Source) -> Path:
    """The path of a source, expanded: a file that is there, or what may be a folder or a name of the hub.

    Raises:
        UserError: a file that is not there, or of an unknown type.
    """
    path = Path(_expand(source.path))
    if "$" in str(path):
        raise UserError(f"{source.path}: the environment variable in this path is not set.")
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise UserError(f"{path}: unknown file type {path.suffix!r}. Known: {', '.join(FILE_TYPES)}.")
    if path.suffix in FILE_TYPES and not path.exists():
        raise UserError(f"{path}: there is no such file (looked in {Path.cwd()}).")
    return path


class Reader:
    """The raw rows of a source, each with its place.

    Args:
        source: what to read.

    Raises:
        UserError: nothing is there, or it cannot be opened.

    Attributes:
        identity: digest of the content; equal content means equal rows.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.file = check_path(source)
        if not self.file.is_file():
            self.dataset = self._load()
            self.identity = content_digest(self.dataset)
            return
        try:
            self.identity = sha256(self.file)
        except OSError as e:
            raise UserError(f"{self.file}: cannot be read: {e.strerror}") from e

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        """``(place, row)``; a row that cannot be read is a :class:`BadRow`."""
        if not self.file.is_file():
            return ((f"row {i}", row) for i, row in enumerate(self.dataset, 1))
        if self.file.suffix in (".jsonl", ".ndjson"):
            return self._json_lines()
        if self.file.suffix == ".json":
            return self._json()
        if self.file.suffix == ".parquet":
            return self._parquet()
        return self._csv()

    def _load(self) -> Any:
        """What `datasets` makes of a folder or a name of the hub."""
        import datasets

        source, path = self.source, _expand(self.source.path)
        try:
            return datasets.load_dataset(path, source.name, split=source.split, revision=source.revision)
        except Exception as e:  # network, names, splits, formats: the message says which
            cause = e.__cause__ or e  # the outer one may say only that there was an error
            reason = " ".join(str(cause).split())[:300].rstrip(".")
            asked = f"(name: {source.name}, split: {source.split}): {reason}."
            if not self.file.is_dir():
                raise UserError(
                    f"{path}: no such file, and it cannot be loaded as a data set of the hub {asked}"
                ) from e
            files = sorted(file.name for file in self.file.iterdir() if file.suffix in FILE_TYPES)
            there = f"Name a file in it ({', '.join(files[:10])})" if files else "It holds no data file: name a file"
            raise UserError(
                f"{path}: a folder, and it cannot be loaded as a data set {asked} {there}, or several as a list."
            ) from e

    def _parquet(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(self.file)
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            for i, row in enumerate(rows, 1):
                yield f"row {i}", row
        except (OSError, ValueError) as e:  # pyarrow's errors are children of these
            raise UserError(f"{self.file}: not a readable Parquet file: {e}") from e

    def _json_lines(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {number}", self._parse(line)

    def _parse(self, line: bytes) -> dict[str, Any] | BadRow:
        try:
            row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
        except UnicodeDecodeError as e:
            return BadRow(f"invalid UTF-8 at byte {e.start + 1} of the line")
        except json.JSONDecodeError as e:
            return BadRow(f"broken JSON at character {e.colno}: {e.msg}")
        except RecursionError:
            return BadRow("JSON that is nested too deeply")
        return row if isinstance(row, dict) else BadRow(f"a row must be an object, got {type(row).__name__}")

    def _text(self) -> str:
        content = self.file.read_bytes()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = content.count(b"\n", 0, e.start) + 1
            raise UserError(f"{self.file}, line {line}: invalid UTF-8. Save the file as UTF-8.") from None

    def _json(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        try:
            rows = json.loads(self._text())
        except json.JSONDecodeError as e:
            hint = " One object a line? Then the file's name must end in .jsonl." if "Extra data" in e.msg else ""
            raise UserError(f"{self.file}, line {e.lineno}, character {e.colno}: broken JSON: {e.msg}.{hint}") from None
        if isinstance(rows, dict):  # {"data": [...]}, as some tools write it
            lists = [value for value in rows.values() if isinstance(value, list)]
            rows = lists[0] if len(lists) == 1 else rows
        if not isinstance(rows, list):
            raise UserError(f"{self.file}: expected a list of objects, got one {type(rows).__name__}.")
        for number, row in enumerate(rows, 1):
            problem = BadRow(f"a row must be an object, got {type(row).__name__}")
            yield f"row {number}", row if isinstance(row, dict) else problem

    def _csv(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        text = self._text()
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # no cell is longer than its file
        delimiter = "\t" if self.file.suffix == ".tsv" else ","
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        begin, header = 1, None
        try:
            for row in lines:
                where, begin = f"line {begin}", lines.line_num + 1
                if not row:
                    continue
                if header is None:
                    header = row
                    if twice := sorted({name for name in header if header.count(name) > 1}):
                        raise UserError(f"{self.file}, {where}: more than one column has the name {twice[0]!r}.")
                elif len(row) != len(header):
                    yield where, BadRow(f"{len(header)} columns expected, got {len(row)}")
                else:
                    yield where, dict(zip(header, row))
        except csv.Error as e:  # where the next row begins is not known
            raise UserError(
                f"{self.file}, line {begin}: the row that begins here is broken CSV, and the rest cannot be read"
                f': {e}. Is a quotation mark not closed? (Inside of "..." it is written "".)'
            ) from None
