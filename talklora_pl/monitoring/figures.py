"""Pictures of routing, made without a display and readable with any colour vision (viridis, cividis, PuOr).

They are narrow, about five inches, so that text of 9 points can be read in TensorBoard's cards without enlarging them.

L layers, N tasks, E experts. Layers are grouped by *kind*: what they are called inside of a decoder layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from talklora_pl.monitoring.metrics import Load
from talklora_pl.names import kind_and_index

EMPTY = "#e4e4e4"  # where a layer has no such expert
CELL = 0.3  # height of a cell of a heat map, in inches
WIDE = 3.3  # width of all columns of a heat map, at most
LEFT, RIGHT, TOP, GAP = 0.85, 0.75, 0.5, 0.65  # margins around the panels, and the room between two of them
DPI = 110


def by_kind(layers: Sequence[str]) -> dict[str, list[int]]:
    """Positions in ``layers`` of every kind, in order of first appearance."""
    kinds: dict[str, list[int]] = {}
    for i, name in enumerate(layers):
        kinds.setdefault(kind_and_index(name)[0], []).append(i)
    return kinds


class Sheet:
    """A figure with panels placed in inches from its upper left corner: no layout to solve, so it is drawn fast."""

    def __init__(self, width: float, height: float, title: str, left: float = LEFT, right: float = RIGHT) -> None:
        self.left, self.right, self.width, self.height = left, right, width + left + right, height + TOP
        self.fig = Figure(figsize=(self.width, self.height), dpi=DPI)
        self.fig.text(0.15 / self.width, 1 - 0.25 / self.height, title, fontsize=12, fontweight="bold", va="center")

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is (left, top) inside of the margins."""
        x, y = self.left + left, self.height - TOP - top - height
        ax: Axes = self.fig.add_axes((x / self.width, y / self.height, width / self.width, height / self.height))
        ax.tick_params(labelsize=9, length=2)
        return ax

    def text(self, top: float, words: str) -> None:
        self.fig.text(0.15 / self.width, 1 - (TOP + top) / self.height, words, fontsize=10, va="center")

    def colours(self, norm: Normalize, cmap: str, top: float, height: float, **options: Any) -> None:
        """A colour scale in the right margin."""
        x, y = self.width - self.right + 0.15, self.height - TOP - top - height
        place = (x / self.width, y / self.height, 0.15 / self.width, height / self.height)
        bar = self.fig.colorbar(ScalarMappable(norm, cmap), cax=self.fig.add_axes(place), **options)
        bar.ax.tick_params(labelsize=9, length=2)


def heat(ax: Axes, values: np.ndarray, norm: Normalize, cmap: str, digits: int | None = None) -> None:
    """A heat map, row 0 on top; ``digits`` writes the numbers into the cells."""
    colours = colormaps[cmap].with_extremes(bad=EMPTY)
    rows, columns = values.shape
    ax.set_facecolor(EMPTY)
    ax.pcolormesh(np.ma.masked_invalid(values), norm=norm, cmap=colours, edgecolors="white", linewidth=0.5)
    ax.set_ylim(rows, 0)
    ax.set_xlim(0, columns)
    ax.set_yticks(np.arange(rows) + 0.5, [str(i) for i in range(rows)])
    if digits is not None:
        for (y, x), v in np.ndenumerate(values):
            if not np.isnan(v):
                r, g, b, _ = colours(norm(v))
                dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.5
                text = f"{v:.{digits}f}"
                ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color="w" if dark else "k")


def cell_width(columns: int) -> float:
    """Width of a cell of a heat map with so many columns, in inches."""
    return min(1.4 * CELL, WIDE / columns)


def number_layers(ax: Axes, layers: Sequence[str], most: int = 13) -> None:
    """Decoder layers as labels of the x axis."""
    labels = ["" if (i := kind_and_index(name)[1]) is None else str(i) for name in layers]
    step = math.ceil(len(labels) / most)
    ax.set_xticks(np.arange(0, len(labels), step) + 0.5, labels[::step])
    ax.set_xlabel("decoder layer", fontsize=9, labelpad=1)


def relative_norm(experts: int) -> TwoSlopeNorm:
    """Colours of relative loads: ideal in the middle, everything at one expert at the end. Equal over time."""
    return TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(experts, 2))


def load(load: Load) -> Figure:
    """Heat maps experts × layers of the relative load, one per kind of layer."""
    kinds = by_kind(load.layers)
    columns = max(map(len, kinds.values()))
    cell = cell_width(columns)
    sizes = {kind: int(load.experts_L[rows].max()) for kind, rows in kinds.items()}
    norm = relative_norm(int(load.experts_L.max()))
    sheet = Sheet(
        max(columns * cell, 2.5), sum(n * CELL + GAP for n in sizes.values()), "Load of every expert (1 is ideal)"
    )
    top = 0.15
    for kind, rows in kinds.items():
        values = load.relative_LE[rows][:, : sizes[kind]].numpy().copy()
        for row, n in zip(values, load.experts_L[rows].tolist(), strict=True):
            row[n:] = np.nan
        ax = sheet.panel(0, top, len(rows) * cell, sizes[kind] * CELL)
        heat(ax, values.T, norm, "cividis", 2 if columns <= 10 else None)
        number_layers(ax, [load.layers[i] for i in rows])
        ax.set_ylabel("expert", fontsize=9)
        ax.set_title(kind, fontsize=11, loc="left", pad=4)
        top += sizes[kind] * CELL + GAP
    sheet.colours(norm, "cividis", 0.15, min(2.5, top - GAP - 0.15), ticks=_load_ticks(norm))
    return sheet.fig


def _load_ticks(norm: TwoSlopeNorm) -> list[float]:
    most = round(norm.vmax or 2)
    return [0, 0.5, 1, *range(2, most + 1, max(1, (most - 1) // 4))]


def tasks(load: Load) -> Figure:
    """How the tasks differ: distance of every task's load from the layer's, and the layers where it is largest."""
    kinds = by_kind(load.layers)
    names = [(t if len(t) <= 20 else f"{t[:19]}…") or "(none)" for t in load.tasks]
    N = len(names)
    distance_LN = load.task_distance_LN()
    norm = Normalize(0, max(0.05, float(distance_LN.max())))
    across = 2 if int(load.experts_L.max()) <= 5 else 1
    top_layers = distance_LN.mean(-1).argsort(descending=True)[: 2 + 2 * across].tolist()
    E = int(load.experts_L[top_layers].max())
    small = min(max(E * CELL, 1.5), WIDE)  # width of a lower panel
    flat = min(CELL, max(0.14, 1.2 / N))  # height of a row of the upper panels
    upper, lower = len(kinds) * (N * flat + GAP), math.ceil(len(top_layers) / across) * (N * CELL + GAP)
    columns = max(map(len, kinds.values()))
    cell = cell_width(columns)
    width = max(columns * cell, across * (small + 0.2))
    sheet = Sheet(width, upper + lower + 1.2, "Routing by task", left=0.25 + 0.075 * max(map(len, names)))
    top = 0.55
    sheet.text(0.05, "Distance of a task's load from that of all tokens\n(total variation; 0 same, 1 disjoint)")
    for kind, rows in kinds.items():
        ax = sheet.panel(0, top, len(rows) * cell, N * flat)
        heat(ax, distance_LN[rows].numpy().T, norm, "viridis")
        number_layers(ax, [load.layers[i] for i in rows])
        ax.set_yticks(np.arange(N) + 0.5, names, fontsize=8 if flat > 0.17 else 6.5)
        ax.set_title(kind, fontsize=11, loc="left", pad=4)
        top += N * flat + GAP
    sheet.colours(norm, "viridis", 0.55, min(2.5, upper - GAP))
    sheet.text(top, "Load of every expert (1 is ideal)\nin the layers where the tasks differ most")
    top += 0.5
    norm = relative_norm(E)
    sheet.colours(norm, "cividis", top, min(2.5, lower - GAP), ticks=_load_ticks(norm))
    for place, i in enumerate(top_layers):
        n = int(load.experts_L[i])
        line, there = divmod(place, across)
        ax = sheet.panel(there * (small + 0.2), top + line * (N * CELL + GAP), small * n / E, N * CELL)
        heat(ax, load.task_share_LNE[i, :, :n].numpy() * n, norm, "cividis", 1 if E <= 8 else None)
        ax.set_yticks(np.arange(N) + 0.5, names if there == 0 else [])
        ax.set_xticks(np.arange(n) + 0.5, [str(e) for e in range(n)])
        ax.set_xlabel("expert", fontsize=8, labelpad=1)
        ax.set_title(short(load.layers[i]), fontsize=9, loc="left", pad=4)
    return sheet.fig


def short(name: str) -> str:
    """``model.layers.3.self_attn.q_proj`` -> ``3 self_attn.q_proj``."""
    kind, index = kind_and_index(name)
    return kind if index is None else f"{index} {kind}"


def communication(matrices: Mapping[str, Tensor], change: bool = False) -> Figure:
    """Who listens to whom in every layer: listeners in rows, speakers in columns.

    Args:
        matrices: by layer.
        change: they are differences from what was there before training.
    """
    names = list(matrices)
    kinds = by_kind(names)
    columns = min(8, max(map(len, kinds.values())))
    lines = [(kind, rows[i : i + columns]) for kind, rows in kinds.items() for i in range(0, len(rows), columns)]
    E = max(map(len, matrices.values()))
    largest = max(float(m.abs().max()) for m in matrices.values())
    largest = largest or 1.0
    signed = change or any(bool((m < 0).any()) for m in matrices.values())
    norm, cmap = (Normalize(-largest, largest), "PuOr") if signed else (Normalize(0, largest), "viridis")
    title = (
        "Who listens more, who less, since the start" if change else "Who listens (rows) to whom (columns), by layer"
    )
    size, gap = 0.36, 0.2 * E  # inches of one matrix; cells between two of them
    pitch = size * (E + gap) / E
    sheet = Sheet(WIDE, max(len(lines) * (size + 0.25), 1.2), title, right=1.0 if change else RIGHT)
    for row, (kind, layers) in enumerate(lines):
        ax = sheet.panel(0, 0.15 + row * (size + 0.25), columns * pitch, size)
        for column, i in enumerate(layers):
            matrix, left = matrices[names[i]], column * (E + gap)
            n = len(matrix)
            ax.imshow(matrix, norm=norm, cmap=cmap, interpolation="nearest", extent=(left, left + n, n, 0))
            index = kind_and_index(names[i])[1]
            if index is not None:
                ax.text(left, -0.1 * E, str(index), fontsize=8)
        ax.set(xlim=(0, columns * (E + gap)), ylim=(E, 0), aspect="auto", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if row == 0 or lines[row - 1][0] != kind:
            ax.set_ylabel(kind.replace(".", ".\n"), fontsize=9, rotation=0, ha="right", va="center")
    sheet.colours(norm, cmap, 0.15, min(2.5, max(len(lines) * (size + 0.25), 1.2) - 0.3))
    return sheet.fig


def allocation(experts: Mapping[str, int]) -> Figure:
    """Experts of every layer; one row of bars for all kinds that have the same numbers."""
    names = list(experts)
    groups: dict[tuple[tuple[int | None, int], ...], list[list[str]]] = {}
    for rows in by_kind(names).values():
        layers = [names[i] for i in rows]
        groups.setdefault(tuple((kind_and_index(name)[1], experts[name]) for name in layers), []).append(layers)
    sheet = Sheet(WIDE, len(groups) * (1.2 + GAP), f"Experts per layer, {sum(experts.values())} in all")
    for row, (bars, kinds) in enumerate(groups.items()):
        ax = sheet.panel(0, 0.15 + row * (1.2 + GAP), WIDE, 1.2)
        counts = [n for _, n in bars]
        drawn = ax.bar(np.arange(len(bars)) + 0.5, counts, color="#35608d", width=0.8)
        if len(bars) <= 33:
            ax.bar_label(drawn, fontsize=7)
        number_layers(ax, kinds[0])
        ax.set(xlim=(0, len(bars)), ylim=(0, 1.25 * max(counts)))
        ax.set_ylabel("experts", fontsize=8)
        titles = [kind_and_index(layers[0])[0].rsplit(".", 1)[-1] for layers in kinds]
        ax.set_title(", ".join(titles), fontsize=10, loc="left", pad=4)
        ax.spines[["top", "right"]].set_visible(False)
    return sheet.fig
