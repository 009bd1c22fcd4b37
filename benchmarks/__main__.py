"""python -m benchmarks: one table of what this package costs, beside the frozen base and PEFT, as JSON and a picture.

    python -m benchmarks --data DIR                        what a CPU does in some minutes
    python -m benchmarks --size gpu --out results          the shapes that count, on a GPU
    python -m benchmarks --size tiny --only layer          whether it runs

``--table FILE`` writes the table of ``results.json`` into a document, between two marks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row
from benchmarks.sections import SECTIONS, Sizes, sizes
from talklora_pl.errors import in_a_line

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--size", choices=["gpu", "cpu", "tiny"], help="default: gpu where there is one, else cpu")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    p.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    p.add_argument("--data", type=Path, help="folder with commonsense/test/csqa.jsonl, for the evaluation")
    p.add_argument("--out", type=Path, default=Path("benchmark-results"))
    p.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="begin nothing new after so many",
    )
    p.add_argument("--table", type=Path, help="a Markdown file to write the table into")
    p.add_argument("--from", dest="files", type=Path, nargs="+", help="measure nothing: results.json of earlier runs")
    args = p.parse_args(argv)
    if args.files:
        results = [json.loads(file.read_text("utf-8")) for file in args.files]
    else:
        results = [_measure(args)]
    text = "\n\n".join(map(markdown, results))
    if args.table:
        write_table(args.table, text)
    print(text)
    return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = args.size or ("cpu" if device == "cpu" else "gpu")
    if device == "cpu":
        torch.set_num_threads(1)  # then the processor's time is that of the computation
    began, rows = time.monotonic(), []
    result = {"machine": _machine(device), "date": f"{datetime.date.today()}", "size": size, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if time.monotonic() - began > args.seconds:
            print(f"{name}: not begun, {args.seconds:.0f} seconds are over", file=sys.stderr)
            continue
        for row in _tried(name, sizes(size, device, args.data, began + args.seconds)):
            rows.append(row.record())
            print(_line(rows[-1]), file=sys.stderr, flush=True)
            # a run that is stopped keeps what it has
            (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw(result, args.out / "results.png")
    return result


def _tried(name: str, s: Sizes) -> Iterator[Row]:
    """A section; one that fails has the reason for a row, and the others go on."""
    try:
        yield from SECTIONS[name](s)
    except Exception as e:
        yield Row(name, "", name, note=f"failed: {in_a_line(e)[:200]}")


def _machine(device: str) -> str:
    versions = f"torch {torch.__version__}"
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, {versions}"
    can = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has it not
    bf16 = next((f" ({name})" for name in ("amx_bf16", "avx512_bf16") if can.get(name)), "")
    return f"{os.cpu_count()}-core {platform.machine()} CPU{bf16}, one thread, {versions}"


def _cells(row: dict[str, Any]) -> list[str]:
    def text(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    ratio = "{1:.2f} ({0:.2f}-{2:.2f})".format(*row["ratio"]) if row["ratio"] else ""
    peak = "" if row["peak"] is None else f"{row['peak'] / 2**20:.0f}"
    return [
        *(ratio, text(row["ms"], ".1f"), text(row["tokens_per_s"], ".0f"), text(row["busy"], ".0%")),
        *(text(row["launches"], "d"), text(row["waits"], "d"), peak, row["note"]),
    ]


def _line(row: dict[str, Any]) -> str:
    return " | ".join([row["section"], row["setting"], row["name"], *_cells(row)])


def markdown(result: dict[str, Any]) -> str:
    """The table, a heading per setting."""
    out = [f"Measured on {result['machine']}, {result['date']}."]
    settings = dict.fromkeys((row["section"], row["setting"]) for row in result["rows"])
    for section, setting in settings:
        head = ["", "ratio (quartiles)", "ms", "tokens/s", "busy", "launches", "waits", "peak MiB", ""]
        rows = [r for r in result["rows"] if (r["section"], r["setting"]) == (section, setting)]
        lines = [[row["name"], *_cells(row)] for row in rows]
        # a column that says nothing here is left out
        used = [i for i in range(len(head)) if i == 0 or any(line[i] for line in lines)]
        title = f"**{section}**" + (f": {setting}" if setting else "")
        table = [[head[i] for i in used], ["---"] * len(used), *([line[i] for i in used] for line in lines)]
        out.append("\n".join([title, "", *("| " + " | ".join(cells) + " |" for cells in table)]))
    return "\n\n".join(out)


def write_table(file: Path, text: str) -> None:
    """Put the table between the marks of a document."""
    document = file.read_text("utf-8")
    mark = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not mark.search(document):
        raise SystemExit(f"{file} has no {BEGIN} and {END}")
    file.write_text(mark.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", document), "utf-8")


def draw(result: dict[str, Any], file: Path) -> None:
    """Bars of the ratios to the floor."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["ratio"]]
    figure = Figure(figsize=(9, 1 + 0.22 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    low, middle, high = zip(*(row["ratio"] for row in rows)) if rows else ((), (), ())
    errors = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
    axes.barh(places, middle, xerr=errors if rows else None, color="#4477aa")
    axes.set_yticks(places, [f"{row['section']}: {row['setting']}: {row['name']}" for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"time as a ratio to the floor; {result['machine']}, {result['date']}")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
