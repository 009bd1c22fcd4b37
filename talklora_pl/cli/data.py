"""``python -m talklora_pl data``: `preview` shows rows as the model reads them, with what is learned marked; `write`
writes rows of benchmarks to train on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.text import Text

from talklora_pl.base import load_tokenizer
from talklora_pl.cli.lightning import CLI, run
from talklora_pl.cli.parse import parse
from talklora_pl.data.table import numbers
from talklora_pl.errors import UserError
from talklora_pl.evaluation import write_lines
from talklora_pl.inputs import NO_LOSS
from talklora_pl.tasks.task import read_tasks

USAGE = """usage: python -m talklora_pl data preview [--limit N] [options of fit]
       python -m talklora_pl data write --tasks TASKS [options], see data write --help

Prints the first rows of every source as the model reads them. Tokens that are learned are coloured on a terminal, and
stand in [[double brackets]] elsewhere; then come the counts. The base's weights are not loaded.

  --limit N   rows of each source (3)
  all other options are those of: python -m talklora_pl fit --help"""


class Preview(CLI):
    """The command line of `fit`, up to where it would begin."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def pieces(tokenizer: Any, ids: list[int], labels: list[int]) -> Iterator[tuple[str, bool]]:
    """The text of each run of tokens that are learned or not, in order."""
    done, text = 0, ""
    for learned, group in groupby(labels or [NO_LOSS] * len(ids), lambda label: label != NO_LOSS):
        done += len(list(group))
        whole = tokenizer.decode(ids[:done], clean_up_tokenization_spaces=False)
        # a run decoded by itself would lose the space before its first word
        yield whole[len(text) :], learned
        text = whole


def marked(tokenizer: Any, ids: list[int], labels: list[int], terminal: bool) -> Text:
    """A sequence for people."""
    out = Text()
    for text, learned in pieces(tokenizer, ids, labels):
        if learned:
            out.append(text if terminal else f"[[{text}]]", "bold green")
        else:
            out.append(text)
    if terminal:
        out.highlight_words([t for t in tokenizer.all_special_tokens if t], "reverse")
    return out


def preview(argv: list[str], limit: int = 3) -> None:
    """Print rows.

    Args:
        argv: options of `fit`.
        limit: rows of each source.

    Raises:
        UserError: all that is wrong with the options or the rows.
    """
    console = Console(highlight=False, soft_wrap=True)
    # an end that nothing comes to, so that none is missed
    data = run("fit", ["--trainer.max_epochs=1", *argv], Preview).datamodule
    data.prepare_data()
    tokenizer = load_tokenizer(data.base)
    for name, parts in data.prepared("fit").items():
        for part in parts:
            for row in part.table.select(range(min(limit, len(part.table)))):
                _print(console, tokenizer, name, row)
            tokens, learned = (int(numbers(part.table, name).sum()) for name in ("length", "loss_tokens"))
            what = f"{learned} of {tokens} tokens learned" if part.table[0]["labels"] else f"{tokens} tokens"
            console.print(Text(f"=== data.{name}: {part.source.path}: {len(part.table)} rows, {what}", "bold"))
    for work in data.streams:
        for row in work.first(limit):
            _print(console, tokenizer, "train", row)
        console.print(Text(f"=== data.train: {work.source.path}: a stream", "bold"))


def _print(console: Console, tokenizer: Any, name: str, row: dict[str, Any]) -> None:
    """One row, all its choices."""
    several = len(row["input_ids"]) > 1
    for choice, ids in enumerate(row["input_ids"]):
        labels = row["labels"][choice] if row["labels"] else []
        counts = f"{len(ids)} tokens, {sum(label != NO_LOSS for label in labels[1:])} learned"
        if several:
            right = choice == row["label"]
            counts = f"choice {choice}, " + (f"right: {counts}" if right else f"wrong: {len(ids)} tokens")
            labels = labels if right else []
        if not row["labels"]:
            counts = f"{len(ids)} tokens, class {row['label']}"
        console.print(Text(f"--- data.{name}: {row['id']}: {counts}", "dim"))
        console.print(marked(tokenizer, ids, labels, console.is_terminal))


def write(
    tasks: str, split: str = "train", data: str | None = None, out: str = "rows", limit: int | None = None
) -> None:
    """Write the questions of benchmarks as rows to train on: OUT/TASK/SPLIT.jsonl.

    Args:
        tasks: with commas between: commonsense, glue, graphlora, alphalora, names of single tasks, or YAML files of
            your own (docs/evaluate.md).
        split: of the data sets; several with commas between.
        data: folder that holds the data sets under their hub names, for machines without the hub.
        out: folder for the files.
        limit: of each, the first so many questions.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data write: --limit {limit} is less than 1.")
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"data write: --out: {out} is a file; name a folder.")
    for task in read_tasks(tasks):
        for name in (part.strip() for part in split.split(",")):
            rows = task.questions(name, data, limit)
            file = Path(out) / task.name / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_lines(file, rows)
            print(f"{file}: {len(rows)} rows")


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    action, *rest = argv or ["--help"]
    if action == "write":
        write(**parse("data write", write, rest))
        return
    if action in ("-h", "--help") or {"-h", "--help"} & {*rest}:
        print(USAGE)
        raise SystemExit(0)  # as the other verbs do
    if action != "preview":
        raise UserError(f"data: there are data preview and data write, not {action!r}.")
    limit, others = "3", []
    args = iter(rest)
    for arg in args:
        if arg == "--limit":
            limit = next(args, "")
        elif arg.startswith("--limit="):
            limit = arg.removeprefix("--limit=")
        else:
            others.append(arg)
    if not limit.isdecimal():
        raise UserError(f"data preview: --limit: {limit!r} is no number of rows.")
    preview(others, int(limit))
