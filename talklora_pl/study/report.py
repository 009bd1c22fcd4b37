"""What came out of a study, as one table and one page.

M methods, S seeds, Q questions.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from talklora_pl.durable import write_whole
from talklora_pl.errors import UserError
from talklora_pl.monitoring.page import palette, picture
from talklora_pl.study.plan import Part
from talklora_pl.study.statistics import Array, Difference, paired, spread
from talklora_pl.study.work import Folder

COLUMNS = {
    "data": "data",
    "method": "method",
    "metric": "metric",
    "seeds": "seeds",
    "score": "score",
    "sd": "sd over seeds",
    "difference": "difference",
    "low": "95 % from",
    "high": "to",
    "detectable": "detectable",
    "verdict": "verdict",
    "parameters": "trained parameters",
    "seconds": "time per step",
    "peak": "peak memory",
    "cv": "load CV",
    "dead_experts": "dead experts",
    "sensitivity": "sensitivity",
    "churn": "churn",
    "choice": "chosen",
    "failed": "failed",
}
"""Of the table: key and title."""


@dataclass
class Cell:
    """A method on a data set.

    Attributes:
        data, method: names.
        results: of its finished runs, by seed.
        score_SQ: one per seed and question: right or not; the loss where nothing is right or wrong.
        metric: what that is.
        failed: errors of runs that failed.
        choice: what the search chose.
    """

    data: str
    method: str
    results: dict[int, dict[str, Any]]
    score_SQ: Array
    metric: str
    failed: list[str]
    choice: dict[str, Any]

    def mean(self, key: str) -> float:
        """Over seeds, of a number of the results or of their last validation; nan where there is none."""
        found = [r.get(key) or (r["curve"][-1] if r["curve"] else {}).get(key) for r in self.results.values()]
        values = [v for v in found if v is not None]
        return sum(values) / len(values) if values else math.nan


def read_cell(folder: Folder, data: Part, method: Part) -> Cell:
    """From the files of its runs.

    Raises:
        UserError: two seeds were tested on other questions.
    """
    results: dict[int, dict[str, Any]] = {}
    scores, asked, failed = list[list[float]](), None, list[str]()
    metric, choice = "accuracy", dict[str, Any]()
    for spec in folder.chosen(data, method) or folder.trials(data, method):
        result = folder.result(spec)
        if result is not None and result["status"] == "failed":
            failed.append(f"{spec.name}: {result['error']}")
        if result is None or "scores" not in result:
            continue
        lines = (folder.runs / spec.name / "test_questions.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines]
        metric = "accuracy" if all("right" in q for q in questions) else "loss"
        names = [(q["task"], q["id"]) for q in questions]
        if asked not in (None, names):
            raise UserError(f"{spec.name} was tested on other questions than the seed before it.")
        asked, choice = names, dict(spec.choice)
        scores.append([float(q["right"] if metric == "accuracy" else q["loss"]) for q in questions])
        results[spec.seed] = result
    return Cell(data.name, method.name, results, np.array(scores), metric, failed, choice)


def difference(cell: Cell, baseline: Cell) -> Difference | None:
    """From the baseline, over the seeds that both have; None where there are none."""
    common = [seed for seed in cell.results if seed in baseline.results]
    if not common or cell is baseline or cell.metric != baseline.metric:
        return None
    rows = [[list(c.results).index(seed) for seed in common] for c in (cell, baseline)]
    return paired(cell.score_SQ[rows[0]], baseline.score_SQ[rows[1]])


def read_cells(folder: Folder) -> dict[str, list[Cell]]:
    """All of a study: by data set, in the order of its methods."""
    return {data.name: [read_cell(folder, data, m) for m in folder.study.methods] for data in folder.study.data}


def table(folder: Folder, cells_by_data: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    """A row per data set and method, in the order of the study: what does not differ beyond noise has no rank."""
    out = []
    for cells in cells_by_data.values():
        baseline = next(c for c in cells if c.method == folder.study.baseline)
        for cell in cells:
            row: dict[str, Any] = {"data": cell.data, "method": cell.method, "seeds": len(cell.results)}
            row |= {"failed": len(cell.failed), "choice": cell.choice}
            if cell.results:
                row |= {"metric": cell.metric, **dict(zip(("score", "sd"), spread(cell.score_SQ)))}
                if (d := difference(cell, baseline)) is not None:
                    row |= {"difference": d.mean, "low": d.low, "high": d.high, "detectable": d.detectable}
                    row |= {"verdict": d.verdict(folder.study.margin)}
                row |= {"parameters": int(cell.mean("parameters"))}
                row |= {"seconds": cell.mean("seconds_per_step") / baseline.mean("seconds_per_step")}
                row |= {"peak": cell.mean("peak_bytes") / baseline.mean("peak_bytes")}
                row |= {key: cell.mean(f"val_load/{key}") for key in ("cv", "dead_experts", "churn")}
                row |= {"sensitivity": cell.mean("sensitivity/change")}
            out.append(row)
    return out


def words(row: dict[str, Any], key: str) -> str:
    """An entry of the table for people."""
    value = row.get(key)
    if value is None or value == {} or (isinstance(value, float) and math.isnan(value)):
        return ""
    if key == "choice":
        return ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in value.items())
    if key in ("seconds", "peak"):
        return f"{value:.2f} x"
    if key in ("difference", "low", "high"):
        return f"{value:+.3f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; columns without an entry are left out."""
    keys = [key for key in COLUMNS if key != "failed" or any(row.get("failed") for row in rows)]
    keys = [key for key in keys if any(words(row, key) for row in rows)]
    cells = [[COLUMNS[key] for key in keys], ["---"] * len(keys), *([words(row, key) for key in keys] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def notes(folder: Folder, rows: list[dict[str, Any]]) -> list[str]:
    """How to read the table."""
    study, (over, total) = folder.study, folder.done()
    out = [f"{over} of {total} runs are over."]
    if detectable := [row["detectable"] for row in rows if row.get("detectable")]:
        out.append(
            f"Of every five true differences of {min(detectable):.3f} to {max(detectable):.3f} from {study.baseline} "
            "(column detectable) a study of this size sees four; what is smaller it cannot tell from chance."
        )
    out.append(
        "difference: from the baseline, paired over questions and seeds, with a 95 % bootstrap interval over both"
        + (". One seed: what another seed would give is not in it." if len(study.seeds) == 1 else ".")
    )
    if any(row.get("metric") == "loss" for row in rows):
        out.append("Of a loss the lower is the better.")
    if len(rows) > 2 * len(study.data):
        out.append("Intervals are for one comparison each: among twenty, one leaves out zero by chance.")
    if len(study.choices) > 1:
        out.append(f"Options of the search were chosen by {study.select} of the first seed; tests played no part.")
    return out


def write(folder: Folder) -> str:
    """All forms of the result: results.json, .csv, .md and index.html. Returns the Markdown."""
    cells = read_cells(folder)
    rows = table(folder, cells)
    said = notes(folder, rows)
    errors = [e for of_data in cells.values() for cell in of_data for e in cell.failed]
    text = markdown(rows) + "".join(f"\n{line}\n" for line in [*said, *(f"Failed: {e}" for e in errors)])
    sheet = io.StringIO()
    lines = csv.DictWriter(sheet, list(COLUMNS), extrasaction="ignore")
    lines.writeheader()
    lines.writerows(rows)
    files = {
        "results.md": text,
        "results.csv": sheet.getvalue(),
        "results.json": json.dumps({"rows": rows, "notes": said, "failed": errors}, indent=1) + "\n",
        "index.html": page(folder, cells, rows, [*said, *errors]),
    }
    for name, content in files.items():
        write_whole(folder.path / name, partial(Path.write_text, data=content, encoding="utf-8"))
    return text


# --- the page


def page(folder: Folder, cells_by_data: dict[str, list[Cell]], rows: list[dict[str, Any]], said: Iterable[str]) -> str:
    """One HTML file that needs nothing else."""
    keys = [key for key in COLUMNS if any(words(row, key) for row in rows)]
    head = "".join(f"<th>{escape(COLUMNS[key])}</th>" for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{escape(words(r, k))}</td>" for k in keys) + "</tr>" for r in rows)
    parts = [
        f"<div class=wide><table><tr>{head}</tr>{body}</table></div>",
        *(f"<p>{escape(line)}</p>" for line in said),
    ]
    for data, cells in cells_by_data.items():
        parts.append(f"<h2>{escape(data)}</h2>")
        if shown := [row for row in rows if row["data"] == data and "difference" in row]:
            parts.append(picture(scores(shown), "scores of the methods"))
        parts.append(picture(curves(cells, folder.study.select), "learning curves"))
        parts += [
            f"<h3>{escape(cell.method)}</h3>" + picture(loads(cell), "load of every expert")
            for cell in cells
            if any(len(row) > 1 for r in cell.results.values() for row in r.get("load", {}).values())
        ]
    return PAGE.replace("TITLE", escape(folder.path.name)).replace("BODY", "\n".join(parts))


def scores(shown: list[dict[str, Any]]) -> Figure:
    """Differences from the baseline with their intervals, and what the study could have seen."""
    fig = Figure(figsize=(7, 1 + 0.4 * len(shown)), layout="constrained")
    ax = fig.add_subplot()
    for y, row in enumerate(shown):
        ax.barh(y, 2 * row["detectable"], left=-row["detectable"], color="#eeeeee", height=0.8)
        ax.plot([row["low"], row["high"]], [y, y], color="#0072B2", linewidth=2)
        ax.plot(row["difference"], y, "o", color="#0072B2")
    ax.axvline(0, color="#444444", linewidth=0.8)
    ax.set_yticks(range(len(shown)), [row["method"] for row in shown])
    ax.invert_yaxis()
    ax.set_xlabel("difference from the baseline, 95 % interval; grey: too small for this study to see")
    return fig


def curves(cells: list[Cell], select: str) -> Figure:
    """The selected validation score over steps: every seed, and their mean."""
    fig = Figure(figsize=(7, 3.2), layout="constrained")
    ax = fig.add_subplot()
    for cell, colour in zip(cells, palette(len(cells))):
        lines = [[(v["step"], v[select]) for v in r["curve"] if select in v] for r in cell.results.values()]
        for line in lines:
            ax.plot(*zip(*line), color=colour, alpha=0.35, linewidth=0.8)
        at = [points for points in zip_longest(*lines) if None not in points]
        if at:
            mean = [(points[0][0], sum(p[1] for p in points) / len(points)) for points in at]
            ax.plot(*zip(*mean), color=colour, label=cell.method, marker="o", markersize=3)
    ax.set_xlabel("optimiser steps")
    ax.set_ylabel(select)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)
    return fig


def loads(cell: Cell) -> Figure:
    """Relative load of every expert in every layer, of the first seed; 1 is ideal."""
    load = next(iter(cell.results.values()))["load"]
    experts = max(map(len, load.values()))
    grid = np.full((len(load), experts), np.nan)
    for i, row in enumerate(load.values()):
        grid[i, : len(row)] = row
    fig = Figure(figsize=(7, 2.2), layout="constrained")
    ax = fig.add_subplot()
    image = ax.imshow(grid.T, aspect="auto", cmap="cividis", vmin=0, vmax=2, interpolation="nearest")
    ax.set_xlabel("adapted layers, from the first to the last")
    ax.set_ylabel("expert")
    ax.set_yticks(range(experts) if experts <= 16 else [0, experts - 1])
    fig.colorbar(image, label="relative load", extend="max")
    return fig


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
img { max-width: 100% }
</style></head><body><h1>TITLE</h1>
BODY
</body></html>
"""
