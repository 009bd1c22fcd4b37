"""Where rows come from: files, folders, data sets of the Hugging Face hub, and Python objects."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from talklora_pl.cache import sha256
from talklora_pl.data.objects import PathOrRows, RowsInPython
from talklora_pl.errors import UserError
from talklora_pl.internals.datasets import content_digest
from talklora_pl.paths import expand
from talklora_pl.registry import did_you_mean
from talklora_pl.strict import read_json

ROW_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_TYPES = (".txt", ".md")
FILE_TYPES = ROW_TYPES + TEXT_TYPES
DEFAULT_SPLIT = "train"


def _zstd(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


@dataclass
class Source:
    """One data set of one task.

    Attributes:
        path: a file (by its ending: .jsonl, .json, .csv, .tsv, .parquet, .txt, .md, each also compressed as .gz, .bz2,
            .xz or .zst; ``$VARIABLES`` and ``~`` are expanded), a folder of such files or of ``save_to_disk``, or a hub
            name. In Python also the rows themselves: a list of dicts, a ``datasets.Dataset`` or ``IterableDataset``, a
            pandas ``DataFrame``, or whatever else gives dicts.
        task: name under which its scores and its routing appear. None: each row's own `task`, or the file's name.
        rows: what a row is, see :mod:`talklora_pl.data.rows`. None: the data module's ``rows``.
        format: how a row is written as text, see :mod:`talklora_pl.data.formats`. None: the data module's ``format``.
        columns: field -> the column (or ``outer.inner``, or a list of columns) that holds it, where the names differ.
        name: configuration of a hub data set.
        split: split of a hub data set, or of a folder with several.
        revision: branch, tag or commit of a hub data set.
        limit: use the first so many rows only.
        weight: of training data, its share of an epoch, beside the weights of the other sources.
        sample_by: what is one row of a text file: the whole ``document``, a ``paragraph`` (they are separated by blank
            lines) or a ``line``.
    """

    path: PathOrRows
    task: str | None = None
    rows: str | None = None
    format: str | None = None
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    name: str | None = None
    split: str = DEFAULT_SPLIT
    revision: str | None = None
    limit: int | None = None
    weight: float | None = None
    sample_by: Literal["document", "paragraph", "line"] = "document"

    def __post_init__(self) -> None:
        """Raises UserError: Python objects that are no rows."""
        if not isinstance(self.path, str):
            self.path = os.fspath(self.path) if isinstance(self.path, os.PathLike) else RowsInPython(self.path)

    @property
    def task_name(self) -> str:
        if isinstance(self.path, RowsInPython):
            return self.task or "data"
        path = Path(str(self.path))
        stem = path.name.removesuffix(file_type(path)[1])
        return self.task or re.sub(r"\W+", "_", Path(stem).stem).strip("_") or "data"


if TYPE_CHECKING:
    Sources = list[str | Source] | dict[str, Source] | PathOrRows | None
else:
    # what a config can say. The list comes first, or jsonargparse would write its sources as text; without Path it
    # would read a file as a part of the config.
    Sources = list[str | Source] | dict[str, Source] | str | Path | None


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


def file_type(path: Path) -> tuple[str, str]:
    """The type of a file and its compression by its name: ``.jsonl`` and ``.gz``, or ``.jsonl`` and nothing."""
    packed = path.suffix if path.suffix in COMPRESSED else ""
    return Path(path.name.removesuffix(packed)).suffix, packed


def check_path(source: Source) -> Path:
    """The path of a source, expanded: a file that is there, or what may be a folder or a name of the hub.

    Raises:
        UserError: a file that is not there, or of an unknown type.
    """
    path = Path(expand(str(source.path)))
    if isinstance(source.path, RowsInPython):
        return path
    if str(source.path).endswith(" in Python") and not path.exists():
        raise UserError(f"{source.path}, which a config only names: give them again, to talklora_pl.fit.")
    kind, packed = file_type(path)
    if path.is_file() and (kind not in FILE_TYPES or (packed and kind == ".parquet")):
        raise UserError(
            f"{path}: unknown file type {kind + packed!r}. Known: {', '.join(FILE_TYPES)}, "
            f"and all but .parquet compressed ({', '.join(COMPRESSED)})."
        )
    if kind in FILE_TYPES and not path.exists():
        raise UserError(f"{path}: there is no such file (looked in {Path.cwd()}).")
    return path


def text_files(path: Path) -> list[Path]:
    """The text file that a path is, or all text files of a folder that holds no data of another type; sorted."""
    if not path.is_dir():
        return [path] if path.is_file() and file_type(path)[0] in TEXT_TYPES else []
    kinds = {file: file_type(file)[0] for file in _files(path)}
    if any(kind in (*ROW_TYPES, ".arrow") for kind in kinds.values()):
        return []
    return [file for file, kind in kinds.items() if kind in TEXT_TYPES]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


class Reader:
    """The raw rows of a source, each with its place.

    Args:
        source: what to read.
        class_column: a column whose numbers become names where the data set says what its classes are.
        streaming: a data set of the hub, and an ``IterableDataset`` of Python, is read as it is used; nothing has a
            digest.

    Raises:
        UserError: nothing is there, or it cannot be opened.

    Attributes:
        identity: digest of the content; equal content means equal rows.
        class_names: of the ``class_column``, in the order of the data set; empty where it has none.
    """

    def __init__(self, source: Source, class_column: str | None = None, streaming: bool = False) -> None:
        self.source, self.class_column, self.streaming = source, class_column, streaming
        self.file = check_path(source)
        self.dataset: Any = None
        self.texts = [] if isinstance(source.path, RowsInPython) else text_files(self.file)
        features: Any = None
        self.identity = ""
        if isinstance(source.path, RowsInPython):
            if streaming and hasattr(source.path.given, "load_state_dict"):
                self.dataset = source.path.given
            else:
                self.dataset, self.identity = source.path.read(source.limit)
            features = getattr(source.path.given, "features", None)
        elif self.texts or self.file.is_file():
            if not streaming:
                self.identity = self._digest(self.texts or [self.file])
            if self.file.is_dir() and (others := [f.name for f in _files(self.file) if f not in self.texts]):
                many = "1 file is no text and is not read:"
                if len(others) > 1:
                    many = f"{len(others)} files are no text and are not read, such as"
                rank_zero_warn(f"{self.file}: {many} {others[0]}")
        else:
            self.dataset = self._load()
            if not streaming:
                self.identity = content_digest(self.dataset)
            elif source.limit is not None and hasattr(self.dataset, "take"):
                self.dataset = self.dataset.take(source.limit)
            features = self.dataset.features
        names = getattr((features or {}).get(class_column), "names", None)
        self.class_names: list[str] = list(names or [])

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        """``(place, row)``; a row that cannot be read is a :class:`BadRow`."""
        return ((where, self.parse(raw)) for where, raw in self.raw())

    def parse(self, raw: Any) -> dict[str, Any] | BadRow:
        """The row of what :meth:`raw` gives."""
        return self._parse(raw) if isinstance(raw, bytes) else raw

    def raw(self) -> Iterator[tuple[str, Any]]:
        """``(place, row)``, the rows as what can be handed to another process at least cost: lines as bytes."""
        if self.dataset is not None:
            return self.of_dataset(self.dataset)
        if self.texts:
            return self._documents()
        kind = file_type(self.file)[0]
        if kind in (".jsonl", ".ndjson"):
            return self._json_lines()
        if kind == ".json":
            return self._json()
        if kind == ".parquet":
            return self._parquet()
        return self._csv()

    @property
    def total(self) -> int | None:
        """How many rows there are, where that is known before they are read."""
        total, kind = None, file_type(self.file)
        if self.dataset is not None:
            total = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        elif kind in ((".jsonl", ""), (".ndjson", "")):
            with self._open(self.file) as lines:
                total = sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 22), b""))
        return total if total is None or self.source.limit is None else min(total, self.source.limit)

    def _digest(self, files: list[Path]) -> str:
        digests = []
        for file in files:
            try:
                digests.append(f"{file.relative_to(self.file)} {sha256(file)}")
            except OSError as e:
                raise UserError(f"{file}: cannot be read: {e.strerror}") from e
        return digests[0].split()[1] if self.file.is_file() else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def of_dataset(self, dataset: Any, done: int = 0) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        """The rows of this data set or of a part of it, of which so many have been read before."""
        names, column = self.class_names, str(self.class_column)
        for i, row in enumerate(dataset, done + 1):
            if not isinstance(row, dict):
                yield f"row {i}", BadRow(f"a row must be a dict, got {type(row).__name__}")
                continue
            if names and type(number := row.get(column)) is int:
                row = row | {column: names[number] if 0 <= number < len(names) else None}  # -1: unknown
            yield f"row {i}", row

    def _load(self) -> Any:
        """What `datasets` makes of a folder or a name of the hub."""
        import datasets

        source, path = self.source, expand(str(self.source.path))
        try:
            if any((self.file / name).is_file() for name in ("state.json", "dataset_dict.json")):
                return self._saved(datasets.load_from_disk(path))
            return datasets.load_dataset(
                path, source.name, split=source.split, revision=source.revision, streaming=self.streaming
            )
        except UserError:
            raise
        except Exception as e:  # network, names, splits, formats: the message says which
            cause = e.__cause__ or e  # the outer one may say only that there was an error
            reason = " ".join(str(cause).split())[:300].rstrip(".")
            asked = f"(name: {source.name}, split: {source.split}): {reason}."
            if not self.file.is_dir():
                raise UserError(
                    f"{path}: no such file, and it cannot be loaded as a data set of the hub {asked}"
                ) from e
            files = sorted(file.name for file in self.file.iterdir() if file_type(file)[0] in FILE_TYPES)
            there = f"Name a file in it ({', '.join(files[:10])})" if files else "It holds no data file: name a file"
            raise UserError(
                f"{path}: a folder, and it cannot be loaded as a data set {asked} {there}, or several as a list."
            ) from e

    def _saved(self, saved: Any) -> Any:
        """The split of a folder of `save_to_disk`, which may hold one data set or several."""
        split = self.source.split
        if not isinstance(saved, dict):
            if split not in (DEFAULT_SPLIT, str(saved.split)):
                raise UserError(f"{self.source.path}: a data set without splits, so leave out split: {split}.")
            return saved
        if split not in saved:
            raise UserError(f"{self.source.path}: there is no split {split!r}.{did_you_mean(split, saved)}")
        return saved[split]

    @contextmanager
    def _open(self, file: Path) -> Iterator[IO[bytes]]:
        """A file, decompressed."""
        packed = file_type(file)[1]
        try:
            with COMPRESSED[packed](file) if packed else file.open("rb") as content:
                yield content
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as e:
            problem = f"cannot be decompressed as {packed}" if packed else "cannot be read"
            raise UserError(f"{file}: {problem}: {getattr(e, 'strerror', None) or e}") from e

    def _documents(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        for file in self.texts:
            text = self._text(file).replace("\r\n", "\n")
            inside = f"file {file.relative_to(self.file)}" if file != self.file else ""
            if self.source.sample_by == "document":
                yield inside or "line 1", {"text": text}
                continue
            part: list[str] = []
            for number, line in enumerate((*text.split("\n"), ""), 1):
                if blank := not line.strip():
                    number -= 1  # the last one before it
                else:
                    part.append(line)
                if part and (blank or self.source.sample_by == "line"):
                    yield inside or f"line {number - len(part) + 1}", {"text": "\n".join(part)}
                    part = []

    def _parquet(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(self.file)
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            for i, row in enumerate(rows, 1):
                yield f"row {i}", row
        except (OSError, ValueError) as e:  # pyarrow's errors are children of these
            raise UserError(f"{self.file}: not a readable Parquet file: {e}") from e

    def _json_lines(self) -> Iterator[tuple[str, bytes]]:
        with self._open(self.file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {number}", line

    def _parse(self, line: bytes) -> dict[str, Any] | BadRow:
        try:
            row = read_json(line.decode("utf-8-sig").rstrip("\r\n"))
        except UnicodeDecodeError as e:
            return BadRow(f"invalid UTF-8 at byte {e.start + 1} of the line")
        except json.JSONDecodeError as e:
            return BadRow(f"broken JSON at character {e.colno}: {e.msg}")
        except RecursionError:
            return BadRow("JSON that is nested too deeply")
        except ValueError as e:  # an integer of 5,000 digits
            return BadRow(f"broken JSON: {e}")
        return row if isinstance(row, dict) else BadRow(f"a row must be an object, got {type(row).__name__}")

    def _text(self, file: Path) -> str:
        with self._open(file) as opened:
            content = opened.read()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = content.count(b"\n", 0, e.start) + 1
            raise UserError(f"{file}, line {line}: invalid UTF-8. Save the file as UTF-8.") from None

    def _json(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        try:
            rows = read_json(self._text(self.file))
        except json.JSONDecodeError as e:
            hint = " One object a line? Then the file's name must end in .jsonl." if "Extra data" in e.msg else ""
            raise UserError(f"{self.file}, line {e.lineno}, character {e.colno}: broken JSON: {e.msg}.{hint}") from None
        except RecursionError:
            raise UserError(f"{self.file}: JSON that is nested too deeply.") from None
        except ValueError as e:  # an integer of 5,000 digits
            raise UserError(f"{self.file}: broken JSON: {e}") from None
        if isinstance(rows, dict):  # {"data": [...]}, as some tools write it
            lists = [value for value in rows.values() if isinstance(value, list)]
            rows = lists[0] if len(lists) == 1 else rows
        if not isinstance(rows, list):
            raise UserError(f"{self.file}: expected a list of objects, got one {type(rows).__name__}.")
        for number, row in enumerate(rows, 1):
            problem = BadRow(f"a row must be an object, got {type(row).__name__}")
            yield f"row {number}", row if isinstance(row, dict) else problem

    def _csv(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        text = self._text(self.file)
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # no cell is longer than its file
        delimiter = "\t" if file_type(self.file)[0] == ".tsv" else ","
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
                    if len(row) == 1 and (other := {";", "\t"} & {*row[0]}):
                        raise UserError(
                            f"{self.file}, {where}: columns seem to be separated by {other.pop()!r}. A .csv has commas "
                            "between its columns and a .tsv tabs: save it as one of them."
                        )
                elif len(row) != len(header):
                    yield where, BadRow(f"{len(header)} columns expected, got {len(row)}")
                else:
                    yield where, dict(zip(header, row))
        except csv.Error as e:  # where the next row begins is not known
            raise UserError(
                f"{self.file}, line {begin}: the row that begins here is broken CSV, and the rest cannot be read"
                f': {e}. Is a quotation mark not closed? (Inside of "..." it is written "".)'
            ) from None
