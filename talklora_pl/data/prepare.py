"""Read, check and tokenise the sources once; afterwards the Arrow file in the cache is what is read."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl import registry
from talklora_pl.base.heads import HEADS
from talklora_pl.cache import cache_root, cached_folder
from talklora_pl.data.example import Example, Tokens
from talklora_pl.data.leaks import digest, digests_of
from talklora_pl.data.parallel import ordered, processes
from talklora_pl.data.progress import Progress
from talklora_pl.data.rows import ABSENT, Row, RowKind, RowReader, check_format, find, row_kind
from talklora_pl.data.source import BadRow, Reader, Source, check_path, text_files
from talklora_pl.data.table import features, from_arrow, to_arrow, write_table
from talklora_pl.data.tokens import Tokenize
from talklora_pl.errors import UserError
from talklora_pl.inputs import NO_LOSS
from talklora_pl.objectives import Objective
from talklora_pl.registry import did_you_mean

if TYPE_CHECKING:
    import datasets

VERSION = 4  # of the prepared form: raise it when the same rows would give other tokens
CHUNK = 500  # rows that a process prepares at a time
ROWS, REPORT = "rows.arrow", "report.json"
SHOWN = 20  # different problems of rows that are spelled out in one message


@dataclass
class Prepared:
    """The rows of one source.

    Attributes:
        table: columns `id`, `task`, `input_ids`, `labels`, `token_type_ids`, `label`, `prompt_length`, `answers`,
            `length` (tokens of the longest sequence), `loss_tokens` (what the objective averages over) and `digests`
            (see :func:`~talklora_pl.data.leaks.digest`; several where texts are packed).
        bad: rows that were left out.
        cut_rows, cut_tokens: how many prompts were too long, and by how many tokens in all.
        documents: how many texts the rows are made of where nothing is asked.
        notices: what was left out or replaced -> in how many rows.
        source: where they are from, with the kind of rows and format that were decided.
    """

    table: datasets.Dataset
    bad: list[BadRow] = field(default_factory=list)
    cut_rows: int = 0
    cut_tokens: int = 0
    documents: int = 0
    notices: dict[str, int] = field(default_factory=dict)
    source: Source = field(default_factory=lambda: Source(""))


def prepare(
    sources: list[Source],
    tokenize: Tokenize,
    objective: Objective,
    *,
    require_answers: bool = True,
    classes: list[str] | None = None,
    num_classes: int | None = None,
    trained: bool = False,
    on_bad_row: str = "error",
    pack: bool = False,
    cache: Path | None = None,
    num_proc: int | None = None,
    later: Iterable[Source] = (),
) -> list[Prepared]:
    """The prepared rows of each source; all problems of all sources in one message.

    Args:
        sources: what to read.
        tokenize: how.
        objective: decides what rows it takes and what is counted in them.
        require_answers: every row must have its answer.
        classes: names of the classes.
        num_classes: number of classes.
        trained: the classes are those of the training data.
        on_bad_row: `error` raises if any row is bad, `skip` leaves bad rows out.
        pack: join short texts to sequences where nothing is asked.
        cache: where to keep the result; None: the user's cache folder.
        num_proc: processes; None: one per core, up to 8.
        later: sources of later stages; only that their files are there is checked.

    Raises:
        UserError: files, options or rows that are wrong.
    """
    problems: list[str] = []
    bad: list[BadRow] = []
    out: list[Prepared] = []
    for source in sources:
        try:
            source = resolve_source(source, objective, bool(tokenize.tokenizer.chat_template))
            read = RowReader(source, require_answers, classes, num_classes, trained)
            out.append(_prepare(source, tokenize, objective, read, pack, cache, num_proc))
        except UserError as e:
            problems.append(str(e))
            continue
        empty = not len(out[-1].table)
        if empty:
            problems.append(f"{source.path}: holds no usable row")
        if empty or on_bad_row == "error":
            bad += out[-1].bad
    for source in later:
        try:
            check_path(source)
        except UserError as e:
            problems.append(str(e))
    lines = _grouped(bad)
    problems += lines[:SHOWN]
    if len(lines) > SHOWN:
        problems.append(f"... and {len(lines) - SHOWN} problems more")
    if bad and on_bad_row == "error" and all(len(part.table) for part in out):
        problems.append("(data.on_bad_row: skip leaves bad rows out and lists them in a file.)")
    if problems:
        raise UserError("\n  ".join(["The data cannot be used:", *dict.fromkeys(problems)]))
    return out


def _grouped(bad: list[BadRow]) -> list[str]:
    """One line per problem, with all the rows that have it."""
    groups: dict[tuple[str, str | None, str], list[BadRow]] = {}
    for row in bad:
        groups.setdefault((row.file, row.column, row.problem), []).append(row)
    lines = []
    for first, *more in groups.values():
        if more:
            unit, number = first.where.split()
            where = f"{unit}s {number}-{more[-1].where.split()[1]} ({1 + len(more)} rows)"
            first = replace(first, where=where)
        lines.append(str(first))
    return lines


def resolve_source(source: Source, objective: Objective, has_template: bool = True) -> Source:
    """A source whose kind of rows and format are decided and fit together.

    Args:
        source: what the user gave.
        objective: whose rows they are.
        has_template: whether its tokenizer has a chat template.

    Raises:
        UserError: they do not.
    """
    try:
        kinds = [kind for name in registry.names(RowKind) if (kind := row_kind(name)).gives == objective.takes]
        kinds.sort(key=lambda kind: kind.name != objective.rows)  # where several have a format, the usual one
        texts = not source.format and objective.takes == "answers" and text_files(check_path(source))
        guess = "text" if texts else next((kind.name for kind in kinds if kind.format == source.format), objective.rows)
        kind = row_kind(source.rows or guess)
        if kind.gives != objective.takes:
            takes = ", ".join(sorted(kind.name for kind in kinds))
            raise UserError(
                f"{kind.name} rows do not fit model.objective: {objective.name} (it takes {takes}) with "
                f"model.base.task: {objective.task}; {_remedy(kind)}."
            )
        source = replace(source, rows=kind.name, format=source.format or kind.format)
        RowReader(source)
        check_format(source.format or "", kind, has_template)
    except UserError as e:
        raise UserError(f"{source.path}: {e}") from None
    return source


def _remedy(kind: RowKind) -> str:
    """What to set so that rows of a kind fit."""
    objectives: list[Any] = [registry.get(Objective, name) for name in registry.names(Objective)]
    fitting = [objective.name for objective in objectives if objective.takes == kind.gives]
    for task, head in HEADS.items():
        if head.objective in fitting:
            classes = (
                " (the classes are those of the training data, unless model.base.num_labels or data.labels say them)"
            )
            return f"set model.base.task: {task}" + (classes if head.classifies else "")
    return f"set model.objective: {fitting[0]}" if fitting else "no objective takes them"


def _prepare(
    source: Source,
    tokenize: Tokenize,
    objective: Objective,
    read: RowReader,
    pack: bool,
    cache: Path | None,
    num_proc: int | None,
) -> Prepared:
    import datasets

    label = read.columns.get("label", "label") if read.kind.gives == "class" else None
    rows = Reader(source, label if isinstance(label, str) else None)
    recipe = [
        VERSION,
        asdict(replace(source, weight=None)),
        rows.identity,
        tokenize.identity,
        tokenize.max_length,
        tokenize.eos,
    ]
    recipe += [
        objective.loss_per,
        _code(read.kind),
        read.require_answers,
        read.classes,
        read.num_classes,
        read.trained,
        pack,
    ]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]

    def write(folder: Path) -> None:
        report = Report(absent=read.mapped())
        work = Work(rows, source, tokenize, objective, read)
        chunks = ordered(work, _chunks(rows, source.limit), processes(num_proc))
        with write_table(folder / ROWS, features()) as write_rows, Progress(str(source.path), rows.total) as progress:
            for part, batch in _joined(chunks, tokenize.max_length, objective) if pack else chunks:
                report += part
                progress.add(part.rows)
                write_rows(batch)
        _check(report, source)
        (folder / REPORT).write_text(json.dumps(report.kept()))

    try:
        folder = cached_folder("data", key, write, cache, verify=True)
    except OSError as e:
        place = cache or cache_root()
        raise UserError(f"data.cache_dir: the prepared rows cannot be kept in {place}: {e.strerror or e}.") from e
    report = json.loads((folder / REPORT).read_text())
    table = datasets.Dataset.from_file(str(folder / ROWS))
    report["bad"] = [BadRow(**bad) for bad in report["bad"]]
    return Prepared(table, **report, source=source)


def stream_work(source: Source, tokenize: Tokenize, objective: Objective, classes: Any, on_bad_row: str) -> Work:
    """What prepares the rows of a source that is streamed, after a look at the first of them.

    Args:
        source: what to read.
        tokenize: how.
        objective: decides what rows it takes.
        classes: the last three arguments of :class:`RowReader`.
        on_bad_row: `error`: those must be good.

    Raises:
        UserError: files, options or rows that are wrong.
    """
    source = resolve_source(source, objective, bool(tokenize.tokenizer.chat_template))
    read = RowReader(source, True, *classes)
    label = read.columns.get("label", "label") if read.kind.gives == "class" else None
    work = Work(
        Reader(source, label if isinstance(label, str) else None, streaming=True), source, tokenize, objective, read
    )
    first = next(_chunks(work.rows, CHUNK), None)
    if first is None:
        raise UserError(f"{source.path}: holds no usable row")
    report, _ = work(first)
    if report.bad and on_bad_row == "error":
        raise UserError(
            "\n  ".join(["The data cannot be used:", *_grouped([BadRow(**bad) for bad in report.bad])[:SHOWN]])
        )
    _check(report, source)
    for notice, count in report.kept()["notices"].items():
        rank_zero_info(f"Warning: {source.path}: {notice} ({count} of the first {report.rows} rows)")
    return work


def scored(
    sources: Iterable[Source], tokenize: Tokenize, objective: Objective, classes: Any, cache: Path | None
) -> np.ndarray:
    """Digests of the rows of sources that are scored later; of those that can be read.

    Args:
        sources: what to read.
        tokenize: whose chat template decides the kind of rows.
        objective: likewise.
        classes: the last three arguments of :class:`RowReader`.
        cache: where to keep them.
    """
    found = [np.empty(0, np.int64)]
    for source in sources:
        with suppress(UserError, OSError):
            source = resolve_source(source, objective, bool(tokenize.tokenizer.chat_template))
            read = RowReader(source, True, *classes)
            label = read.columns.get("label", "label") if read.kind.gives == "class" else None
            rows = Reader(source, label if isinstance(label, str) else None)
            found.append(digests_of(rows, read, _code(read.kind), cache))
    return np.concatenate(found)


def _code(kind: RowKind) -> str:
    """The text of the file that a kind of rows is from: a user may change it."""
    try:
        return inspect.getsource(sys.modules[type(kind).__module__])
    except (OSError, TypeError):  # typed at a prompt
        return ""


Chunk = tuple[int, list[tuple[str, Any]]]
"""Raw rows, each with its place, and the number of the first of them."""


def _chunks(rows: Reader, limit: int | None) -> Iterator[Chunk]:
    raw, number = islice(rows.raw(), limit), 0
    while chunk := list(islice(raw, CHUNK)):
        yield number, chunk
        number += len(chunk)


@dataclass
class Report:
    """What is to be said of rows, of a chunk and then of a source. For the fields see :class:`Prepared`, and

    Attributes:
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
        chunk = next(_chunks(self.rows, limit), (0, []))
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


def _check(report: Report, source: Source) -> None:
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


def _joined(
    chunks: Iterable[tuple[Report, bytes]], max_length: int, objective: Objective
) -> Iterator[tuple[Report, bytes]]:
    """The chunks with their short texts joined, also across the end of a chunk."""
    held: dict[str, Any] | None = None
    empty = Report({})
    for report, batch in chunks:
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
