"""Read, check and tokenise the sources once; afterwards the Arrow file in the cache is what is read."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl import registry
from talklora_pl.base.heads import HEADS
from talklora_pl.cache import cache_root, cached_folder
from talklora_pl.data.leaks import digests_of
from talklora_pl.data.parallel import ordered, processes
from talklora_pl.data.progress import Progress
from talklora_pl.data.rows import RowKind, RowReader, check_format, row_kind
from talklora_pl.data.source import BadRow, Reader, Source, check_path, text_files
from talklora_pl.data.table import features, write_table
from talklora_pl.data.tokens import Tokenize
from talklora_pl.data.work import CHUNK, Report, Work, check_report, chunks, joined
from talklora_pl.errors import UserError
from talklora_pl.objectives import Objective

if TYPE_CHECKING:
    import datasets

VERSION = 4  # of the prepared form: raise it when the same rows would give other tokens
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
        batches = ordered(work, chunks(rows, source.limit), processes(num_proc))
        with write_table(folder / ROWS, features()) as write_rows, Progress(str(source.path), rows.total) as progress:
            for part, batch in joined(batches, tokenize.max_length, objective) if pack else batches:
                report += part
                progress.add(part.rows)
                write_rows(batch)
        check_report(report, source)
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
    first = next(chunks(work.rows, CHUNK), None)
    if first is None:
        raise UserError(f"{source.path}: holds no usable row")
    report, _ = work(first)
    if report.bad and on_bad_row == "error":
        raise UserError(
            "\n  ".join(["The data cannot be used:", *_grouped([BadRow(**bad) for bad in report.bad])[:SHOWN]])
        )
    check_report(report, source)
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
