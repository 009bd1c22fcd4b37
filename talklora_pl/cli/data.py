"""``python -m talklora_pl data``: `preview` shows rows as the model reads them, with what is learned marked; `write`
writes rows of benchmarks to train on."""

from __future__ import annotations

from pathlib import Path

from talklora_pl.cli.parse import parse
from talklora_pl.errors import UserError

USAGE = """usage: python -m talklora_pl data preview [--limit N] [options of fit]
       python -m talklora_pl data write --tasks TASKS [options], see data write --help

Prints the first rows of every source as the model reads them. Tokens that are learned are coloured on a terminal, and
stand in [[double brackets]] elsewhere; then come the counts. The base's weights are not loaded.

  --limit N   rows of each source (3)
  all other options are those of: python -m talklora_pl fit --help"""


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

    from talklora_pl.evaluation import write_lines
    from talklora_pl.tasks.task import read_tasks

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

    from talklora_pl.cli.preview import preview

    preview(others, int(limit))
