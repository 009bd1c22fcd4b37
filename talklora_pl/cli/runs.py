"""``python -m talklora_pl runs``: the runs of a folder, told apart."""

from __future__ import annotations

import os
from json import dumps, loads
from pathlib import Path
from typing import Any

from talklora_pl.cli.parse import parse
from talklora_pl.paths import expand
from talklora_pl.runs import RUNS, Run, all_runs

MOST = 24
"""So many columns a name gets at least, if it is that long."""


def row(run: Run) -> dict[str, Any]:
    """What there is to say of a run."""
    record = run.record
    scores = dict(record.get("scores") or {})
    try:
        tested = loads((run.folder / "test_scores.json").read_text(encoding="utf-8"))
        mean: dict[str, float] = tested["adapter"]["mean"]
        scores |= {f"test_{name}": value for name, value in mean.items() if name != "questions"}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    told = {name: record.get(name) for name in ("method", "data", "base", "seed")}
    return {"name": run.name, **told, "state": run.state, "scores": scores, "folder": str(run.folder)}


def show(root: str = RUNS, json: bool = False) -> None:
    """List runs, oldest first: method, data, seed, state, scores.

    Args:
        root: the folder of all runs, trainer.default_root_dir of the fit.
        json: machine-readable.
    """
    rows = [row(run) for run in all_runs(expand(root))]
    if json:
        print(dumps(rows, indent=1, ensure_ascii=False))
        return
    if not rows:
        print(f"There are no runs in {Path(root).resolve()}.")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Runs in {root}", title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("run", "method, data", "seed", "state", "scores"):
        table.add_column(title, overflow="fold", no_wrap=title in ("seed", "scores"))
    table.columns[3].max_width = len("stopped at")
    longest = [0, 0]
    for r in rows:
        scores = "\n".join(f"{name} {value:.4g}" for name, value in r["scores"].items())
        told = [r["method"] or "", *(Path(name).name for name in (r["data"] or "").split(", "))]
        name = os.path.relpath(r["folder"], expand(root))
        table.add_row(name, "\n".join(told), "" if r["seed"] is None else str(r["seed"]), r["state"], scores)
        longest = [max(longest[0], len(name)), max(longest[1], *map(len, told))]
    for column, width in zip(table.columns, longest):
        column.min_width = min(width, MOST)
    Console(markup=False).print(table)


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    show(**parse(verb, show, argv))
