"""Read, check and tokenise the sources once; afterwards the Arrow file in the cache is what is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talklora_pl.cache import cached_folder
from talklora_pl.data.formats import DEFAULT, check_format
from talklora_pl.data.rows import RowReader, check_kind
from talklora_pl.data.source import BadRow, Reader, Source
from talklora_pl.data.tokens import NO_LOSS, Tokenize
from talklora_pl.errors import UserError

if TYPE_CHECKING:
    import datasets

VERSION = 1  # of the prepared form: raise it when the same rows would give other tokens
SHOWN = 20  # bad rows that are spelled out in one message


@dataclass
class Prepared:
    """The rows of one source.

    Attributes:
        table: columns `id`, `task`, `input_ids`, `labels`, `label`, `prompt_length`, `answers`, `length` (tokens of the
            longest sequence) and `loss_tokens` (labels of the right answer that carry loss).
        bad: rows that were left out.
        cut_rows, cut_tokens: how many prompts were too long, and by how many tokens in all.
    """

    table: datasets.Dataset
    bad: list[BadRow] = field(default_factory=list)
    cut_rows: int = 0
    cut_tokens: int = 0


def prepare(
    sources: list[Source],
    tokenize: Tokenize,
    *,
    gold: bool = True,
    classes: list[str] | None = None,
    num_classes: int | None = None,
    on_bad_row: str = "error",
    cache: Path | None = None,
) -> list[Prepared]:
    """The prepared rows of each source; all problems of all sources in one message.

    Args:
        sources: what to read.
        tokenize: how.
        gold: every row must have its answer.
        classes: names of the classes.
        num_classes: number of classes.
        on_bad_row: `error` raises if any row is bad, `skip` leaves bad rows out.
        cache: where to keep the result; None: the user's cache folder.

    Raises:
        UserError: files, options or rows that are wrong.
    """
    problems: list[str] = []
    bad: list[BadRow] = []
    out: list[Prepared] = []
    for source in sources:
        try:
            source = settle(source, tokenize.classify)
            out.append(_prepare(source, tokenize, RowReader(source, gold, classes, num_classes), cache))
        except UserError as e:
            problems.append(str(e))
            continue
        bad += out[-1].bad
        if not len(out[-1].table) and (on_bad_row == "skip" or not out[-1].bad):
            problems.append(f"{source.path}: holds no usable row")
    if on_bad_row == "error":
        problems += map(str, bad[:SHOWN])
        if len(bad) > SHOWN:
            problems.append(f"... and {len(bad) - SHOWN} bad rows more")
        if bad:
            problems.append("(data.on_bad_row: skip leaves bad rows out and lists them in a file.)")
    if problems:
        raise UserError("\n  ".join(["The data cannot be used:", *dict.fromkeys(problems)]))
    return out


def settle(source: Source, classify: bool) -> Source:
    """A source whose kind of rows and format are decided and fit together.

    Raises:
        UserError: they do not.
    """
    try:
        by_format = {name: kind for kind, name in DEFAULT.items() if kind != "classification"}
        guess = "classification" if classify else by_format.get(source.format or "", "completion")
        kind = source.rows or guess
        check_kind(kind, source.columns)
        if classify != (kind == "classification"):
            task = "sequence_classification" if classify else "causal_lm"
            raise UserError(f"{kind} rows do not fit model.base.task: {task}")
        name = source.format or DEFAULT[kind]
        check_format(name, kind)
    except UserError as e:
        raise UserError(f"{source.path}: {e}") from None
    return replace(source, rows=kind, format=name)


def _prepare(source: Source, tokenize: Tokenize, read: RowReader, cache: Path | None) -> Prepared:
    import datasets

    rows = Reader(source)
    recipe = [VERSION, asdict(source), rows.identity, tokenize.identity, tokenize.max_length, tokenize.eos]
    recipe += [tokenize.classify, read.gold, read.classes, read.num_classes]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]

    def write(folder: Path) -> None:
        report = {"bad": [], "cut_rows": 0, "cut_tokens": 0}
        from datasets.arrow_writer import ArrowWriter

        with ArrowWriter(features=_features(), path=str(folder / "rows.arrow")) as writer:
            for row in _rows(rows, source, tokenize, read, report):
                writer.write(row)
            writer.finalize()
        (folder / "report.json").write_text(json.dumps(report))

    folder = cached_folder("data", key, write, cache)
    report = json.loads((folder / "report.json").read_text())
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return Prepared(table, [BadRow(**bad) for bad in report["bad"]], report["cut_rows"], report["cut_tokens"])


def _rows(
    rows: Reader, source: Source, tokenize: Tokenize, read: RowReader, report: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of the table; what is bad or cut goes into the report."""
    for number, (where, row) in enumerate(rows):
        if number == source.limit:
            return
        try:
            if isinstance(row, BadRow):
                raise row
            example = read(row)
            tokens = tokenize(example, source.format or "")
            loss_tokens = [sum(label != NO_LOSS for label in labels[1:]) for labels in tokens.labels]
        except BadRow as e:
            report["bad"].append({"problem": e.problem, "column": e.column, "where": where, "file": source.path})
            continue
        if tokens.cut:
            report["cut_rows"] += 1
            report["cut_tokens"] += tokens.cut
        task = row.get(_column(source, "task"))
        label = -1 if example.label is None else example.label
        yield {
            "id": str(row.get(_column(source, "id"), f"{source.task_name}-{number}")),
            "task": source.task or (task if isinstance(task, str) and task else source.task_name),
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "label": label,
            "prompt_length": tokens.prompt_length,
            "answers": example.answers,
            "length": max(map(len, tokens.input_ids)),
            "loss_tokens": 1 if tokenize.classify else loss_tokens[max(label, 0)],
        }


def _column(source: Source, name: str) -> str:
    column = source.columns.get(name, name)
    return column if isinstance(column, str) else column[0]


def _features() -> datasets.Features:
    from datasets import Features, Value

    ids = [[Value("int32")]]
    return Features(
        {
            "id": Value("string"),
            "task": Value("string"),
            "input_ids": ids,
            "labels": ids,
            "label": Value("int32"),
            "prompt_length": Value("int32"),
            "answers": [Value("string")],
            "length": Value("int32"),
            "loss_tokens": Value("int32"),
        }
    )
