"""Read, check and tokenise the sources once; afterwards the Arrow file in the cache is what is read."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talklora_pl import registry
from talklora_pl.base.heads import HEADS
from talklora_pl.cache import cache_root, cached_folder
from talklora_pl.data.example import Example, Tokens
from talklora_pl.data.rows import ABSENT, Row, RowKind, RowReader, check_format, find, row_kind
from talklora_pl.data.source import BadRow, Reader, Source, check_path, text_files
from talklora_pl.data.tokens import Tokenize
from talklora_pl.errors import UserError
from talklora_pl.inputs import NO_LOSS
from talklora_pl.internals.datasets import row_writer
from talklora_pl.objectives import Objective
from talklora_pl.registry import did_you_mean

if TYPE_CHECKING:
    import datasets

VERSION = 3  # of the prepared form: raise it when the same rows would give other tokens
SHOWN = 20  # different problems of rows that are spelled out in one message


@dataclass
class Prepared:
    """The rows of one source.

    Attributes:
        table: columns `id`, `task`, `input_ids`, `labels`, `token_type_ids`, `label`, `prompt_length`, `answers`,
            `length` (tokens of the longest sequence) and `loss_tokens` (what the objective averages over).
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
            out.append(_prepare(source, tokenize, objective, read, pack, cache))
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
    source: Source, tokenize: Tokenize, objective: Objective, read: RowReader, pack: bool, cache: Path | None
) -> Prepared:
    import datasets

    label = read.columns.get("label", "label") if read.kind.gives == "class" else None
    rows = Reader(source, label if isinstance(label, str) else None)
    recipe = [VERSION, asdict(source), rows.identity, tokenize.identity, tokenize.max_length, tokenize.eos]
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
        report: dict[str, Any] = {"bad": [], "cut_rows": 0, "cut_tokens": 0, "documents": 0, "notices": Counter()}
        with row_writer(str(folder / "rows.arrow"), _features()) as writer:
            table = _rows(rows, source, tokenize, objective, read, report)
            for row in _packed(table, tokenize.max_length, objective) if pack else table:
                writer.write(row)
            writer.finalize()
        (folder / "report.json").write_text(json.dumps(report))

    try:
        folder = cached_folder("data", key, write, cache)
    except OSError as e:
        place = cache or cache_root()
        raise UserError(f"data.cache_dir: the prepared rows cannot be kept in {place}: {e.strerror or e}.") from e
    report = json.loads((folder / "report.json").read_text())
    table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    report["bad"] = [BadRow(**bad) for bad in report["bad"]]
    return Prepared(table, **report, source=source)


def _code(kind: RowKind) -> str:
    """The text of the file that a kind of rows is from: a user may change it."""
    try:
        return inspect.getsource(sys.modules[type(kind).__module__])
    except (OSError, TypeError):  # typed at a prompt
        return ""


def _rows(
    rows: Reader, source: Source, tokenize: Tokenize, objective: Objective, read: RowReader, report: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of the table; what is bad or cut goes into the report."""
    absent, there = read.mapped(), dict[str, None]()
    used, unused, with_input = read.used(), Counter[str](), False
    for number, (where, row) in enumerate(islice(rows, source.limit)):
        if isinstance(row, dict):
            there |= dict.fromkeys(_columns(row))
        if absent and isinstance(row, dict):
            absent = {column: name for column, name in absent.items() if find(row, column) is ABSENT}
        try:
            if isinstance(row, BadRow):
                raise row
            example = read(row)
            parts = list(read.kind.sequences(example, source.format or "", tokenize))
            name, task = (Row(row, read).get(field, required=False) for field in ("id", "task"))
        except BadRow as e:
            report["bad"].append({"problem": e.problem, "column": e.column, "where": where, "file": source.path})
            continue
        with_input = with_input or bool(example.input)
        unused.update(column for column, value in row.items() if column not in used and value not in (None, "", [], {}))
        label = -1 if example.label is None else example.label
        name = f"{source.task_name}-{number}" if name is None else str(name)
        report["documents"] += not parts[0].prompt_length and bool(parts[0].labels)
        report["notices"].update({notice for tokens in parts for notice in tokens.notices})
        for i, tokens in enumerate(parts):
            if tokens.cut:
                report["cut_rows"] += 1
                report["cut_tokens"] += tokens.cut
            yield {
                "id": f"{name}.{i}" if len(parts) > 1 else name,
                "task": source.task or (source.task_name if task in (None, "") else str(task)),
                "input_ids": tokens.input_ids,
                "labels": tokens.labels,
                "token_type_ids": tokens.token_type_ids,
                "label": label,
                "prompt_length": tokens.prompt_length,
                "answers": _answers(example, tokens),
                "length": max(map(len, tokens.input_ids)),
                "loss_tokens": _counted(tokens.labels, label, objective),
            }
    report["notices"].update({f"the column {column!r} is not used": count for column, count in unused.items()})
    if "{input}" in (source.format or "") and there and not with_input:
        raise UserError(f"{source.path}: format: no column fills {{input}}: no row has an 'input' that is not empty.")
    if absent and there:
        lines = (
            f"{source.path}: columns: {{{name}: {column}}}: no row has {column!r}.{did_you_mean(column, there)}"
            for column, name in absent.items()
        )
        raise UserError("\n  ".join(lines))


def _counted(labels: list[list[int]], right: int, objective: Objective) -> int:
    return 1 if objective.loss_per == "row" else sum(label != NO_LOSS for label in labels[max(right, 0)][1:])


def _packed(rows: Iterable[dict[str, Any]], max_length: int, objective: Objective) -> Iterator[dict[str, Any]]:
    """Rows in which nothing is asked joined where they fit into a sequence; the first of them gives the id."""
    held: dict[str, Any] | None = None
    for row in rows:
        whole = not row["prompt_length"] and bool(row["labels"])
        if held and whole and held["task"] == row["task"] and held["length"] + row["length"] <= max_length:
            ids, labels = ([held[name][0] + row[name][0]] for name in ("input_ids", "labels"))
            held |= {"input_ids": ids, "labels": labels, "length": len(ids[0])}
            held["loss_tokens"] = _counted(labels, 0, objective)
            continue
        if held:
            yield held
        held = row if whole else None
        if not whole:
            yield row
    if held:
        yield held


def _answers(example: Example, tokens: Tokens) -> list[str]:
    """Texts to compare a generated answer with, or of the choices; none where there is no prompt to answer."""
    if not tokens.prompt_length:
        return []
    return example.answers if tokens.answer is None else [tokens.answer]


def _columns(row: dict[str, Any]) -> Iterator[str]:
    """What a mapping can name in a row."""
    for column, value in row.items():
        yield column
        if isinstance(value, dict):
            yield from (f"{column}.{inner}" for inner in value)


def _features() -> datasets.Features:
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
        }
    )
