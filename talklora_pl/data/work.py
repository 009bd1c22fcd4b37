"""What a process does with a chunk of rows: raw rows in, a batch of Arrow and a report of what was wrong out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from talklora_pl.data.example import Example, Tokens
from talklora_pl.data.leaks import digest
from talklora_pl.data.rows import ABSENT, Row, RowReader, find
from talklora_pl.data.source import BadRow, Reader, Source
from talklora_pl.data.table import features, from_arrow, to_arrow
from talklora_pl.data.tokens import Tokenize
from talklora_pl.errors import UserError
from talklora_pl.inputs import NO_LOSS
from talklora_pl.objectives import Objective
from talklora_pl.registry import did_you_mean

CHUNK = 500  # rows that a process prepares at a time

Chunk = tuple[int, list[tuple[str, Any]]]
"""Raw rows, each with its place, and the number of the first of them."""


def chunks(rows: Reader, limit: int | None) -> Iterator[Chunk]:
    raw, number = islice(rows.raw(), limit), 0
    while chunk := list(islice(raw, CHUNK)):
        yield number, chunk
        number += len(chunk)


@dataclass
class Report:
    """What is to be said of rows, of a chunk and then of a source.

    Attributes, beside those of :class:`~talklora_pl.data.prepare.Prepared`:
        rows: how many were read.
        absent: columns that the user has mapped and that no row has had -> fields.
        columns: what the rows have, as long as any of `absent` is not found.
        with_input: whether any has an `input`.
        unused: columns that nothing is read from, in how many rows.
    """

    absent: dict[str, str]
    rows: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    cut_rows: int = 0
    cut_tokens: int = 0
    documents: int = 0
    notices: Counter[str] = field(default_factory=Counter)
    columns: dict[str, None] = field(default_factory=dict)
    with_input: bool = False
    unused: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Report) -> Report:
        self.absent = {column: name for column, name in self.absent.items() if column in other.absent}
        for name in ("rows", "bad", "cut_rows", "cut_tokens", "documents", "notices", "unused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.columns |= other.columns
        self.with_input = self.with_input or other.with_input
        return self

    def kept(self) -> dict[str, Any]:
        """What the cache keeps."""
        names = ("bad", "cut_rows", "cut_tokens", "documents")
        return {name: getattr(self, name) for name in names} | {"notices": {**self.notices, **_unused(self.unused)}}


def _unused(columns: Counter[str]) -> dict[str, int]:
    """One notice of all columns that are not used, and in how many rows those are that most rows have."""
    if not columns:
        return {}
    most = max(columns.values())
    named = [repr(c) + (f" (in {count} rows)" if count < most else "") for c, count in columns.most_common()]
    return {f"the column{'s' * (len(named) > 1)} {', '.join(named)} {'are' if len(named) > 1 else 'is'} not used": most}


@dataclass
class Work:
    """Turns a chunk of raw rows into a report and a batch of Arrow."""

    rows: Reader
    source: Source
    tokenize: Tokenize
    objective: Objective
    read: RowReader

    def __call__(self, chunk: Chunk) -> tuple[Report, bytes]:
        report = Report(absent=self.read.mapped())
        return report, to_arrow(list(self.table(enumerate(chunk[1], chunk[0]), report)), features())

    def first(self, limit: int) -> list[dict[str, Any]]:
        """Rows of the table that the first raw rows become."""
        chunk = next(chunks(self.rows, limit), (0, []))
        return from_arrow(self(chunk)[1])

    def table(self, raw: Iterable[tuple[int, tuple[str, Any]]], report: Report) -> Iterator[dict[str, Any]]:
        """Rows of the table that raw rows, each with its number, become; what is bad or cut goes into the report."""
        used, task = self.read.used(), self.source.task_name
        parsed = [(number, where, self.rows.parse(item)) for number, (where, item) in raw]
        self.tokenize.encoder.meet(text for *_, row in parsed for text in _texts(row))
        for number, where, row in parsed:
            yield from self._row(number, where, row, used, task, report)

    def _row(
        self, number: int, where: str, row: Any, used: set[str], task_name: str, report: Report
    ) -> Iterator[dict[str, Any]]:
        source = self.source
        report.rows += 1
        if isinstance(row, dict) and (report.absent or not report.columns):
            report.columns |= dict.fromkeys(_columns(row))
            absent = report.absent.items()
            report.absent = {column: name for column, name in absent if find(row, column) is ABSENT}
        try:
            if isinstance(row, BadRow):
                raise row
            example = self.read(row)
            parts = list(self.read.kind.sequences(example, source.format or "", self.tokenize))
            asked = Row(row, self.read)
            name, task = asked.get("id", required=False), asked.get("task", required=False)
        except BadRow as e:
            report.bad.append({"problem": e.problem, "column": e.column, "where": where, "file": source.path})
            return
        report.with_input = report.with_input or bool(example.input)
        for column, value in row.items():
            if column not in used and value not in (None, "", [], {}):
                report.unused[column] += 1
        label, said = -1 if example.label is None else example.label, digest(example)
        name = f"{task_name}-{number}" if name is None else str(name)
        report.documents += not parts[0].prompt_length and bool(parts[0].labels)
        report.notices.update({notice for tokens in parts for notice in tokens.notices})
        for i, tokens in enumerate(parts):
            if tokens.cut:
                report.cut_rows += 1
                report.cut_tokens += tokens.cut
            yield {
                "id": f"{name}.{i}" if len(parts) > 1 else name,
                "task": source.task or (task_name if task in (None, "") else str(task)),
                "input_ids": tokens.input_ids,
                "labels": tokens.labels,
                "token_type_ids": tokens.token_type_ids,
                "label": label,
                "prompt_length": tokens.prompt_length,
                "answers": _answers(example, tokens),
                "length": max(map(len, tokens.input_ids)),
                "loss_tokens": _counted(tokens.labels, label, self.objective),
                "digests": [said],
            }


def check_report(report: Report, source: Source) -> None:
    """Raise UserError where no row has what the user's options speak of."""
    if not report.columns:
        return
    if "{input}" in (source.format or "") and not report.with_input:
        raise UserError(f"{source.path}: format: no column fills {{input}}: no row has an 'input' that is not empty.")
    if report.absent:
        lines = (
            f"{source.path}: columns: {{{name}: {column}}}: no row has {column!r}."
            + did_you_mean(column, report.columns)
            for column, name in report.absent.items()
        )
        raise UserError("\n  ".join(lines))


def _counted(labels: list[list[int]], right: int, objective: Objective) -> int:
    if objective.loss_per == "row":
        return 1
    learned = labels[max(right, 0)][1:]
    return len(learned) - learned.count(NO_LOSS)


def joined(
    batches: Iterable[tuple[Report, bytes]], max_length: int, objective: Objective
) -> Iterator[tuple[Report, bytes]]:
    """The batches of chunks with their short texts joined, also across the end of a chunk."""
    held: dict[str, Any] | None = None
    empty = Report({})
    for report, batch in batches:
        rows = from_arrow(batch)
        done = list(_packed([held, *rows] if held else rows, max_length, objective))
        held = done.pop() if done else None
        yield report, to_arrow(done, features())
        empty = Report(report.absent)
    if held:
        yield empty, to_arrow([held], features())


def _packed(rows: Iterable[dict[str, Any]], max_length: int, objective: Objective) -> Iterator[dict[str, Any]]:
    """Rows in which nothing is asked joined where they fit into a sequence; the first of them gives the id."""
    held: dict[str, Any] | None = None
    for row in rows:
        if held and _whole(row) and held["task"] == row["task"] and held["length"] + row["length"] <= max_length:
            ids, labels = ([held[name][0] + row[name][0]] for name in ("input_ids", "labels"))
            held |= {"input_ids": ids, "labels": labels, "length": len(ids[0])}
            held["digests"] = [*held["digests"], *row["digests"]]
            held["loss_tokens"] = _counted(labels, 0, objective)
            continue
        if held:
            yield held
        held = row if _whole(row) else None
        if not held:
            yield row
    if held:
        yield held


def _whole(row: dict[str, Any]) -> bool:
    return not row["prompt_length"] and bool(row["labels"])


def _answers(example: Example, tokens: Tokens) -> list[str]:
    """Texts to compare a generated answer with, or of the choices; none where there is no prompt to answer."""
    if not tokens.prompt_length:
        return []
    return example.answers if tokens.answer is None else [tokens.answer]


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _columns(row: dict[str, Any]) -> Iterator[str]:
    """What a mapping can name in a row."""
    for column, value in row.items():
        yield column
        if isinstance(value, dict):
            yield from (f"{column}.{inner}" for inner in value)
