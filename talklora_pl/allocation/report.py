"""What was decided, for people: a table, a bar chart, and YAML that a config can include."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from talklora_pl import registry
from talklora_pl.allocation import Allocation, LayerTargets
from talklora_pl.allocation.spectra import Exponents, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Counts = Mapping[str, int]
"""Experts by module name."""


def of_layer(layer: LayerTargets, counts: Counts) -> list[int]:
    """Distinct numbers of one layer: one, unless the rule went by module."""
    return sorted({counts[module] for module in layer.modules})


def layer_list(layers: Sequence[LayerTargets], counts: Counts) -> list[int] | None:
    """One number per layer; None where the modules of a layer differ."""
    numbers = [of_layer(layer, counts) for layer in layers]
    return [n[0] for n in numbers] if all(len(n) == 1 for n in numbers) else None


def total(layers: Sequence[LayerTargets], counts: Counts) -> float:
    """Experts summed over layers, each layer with the mean over its target modules: what a budget limits."""
    return sum(fmean(counts[module] for module in layer.modules) for layer in layers)


def table(
    layers: Sequence[LayerTargets],
    decided: Mapping[str, Counts],
    exponents: Mapping[str, Exponents] | None = None,
    estimator: str = "peak",
) -> Table:
    """Layers down, rules across; with exponents their mean over all Linears of the layer and their spread."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("layer", justify="right")
    other = next(name for name in ("median", "peak") if name != estimator)
    if exponents is not None:
        for title in (f"alpha ({estimator})", "min-max", f"alpha ({other})"):
            out.add_column(title, justify="right", no_wrap=True)
    most = max(max(counts.values()) for counts in decided.values())
    for name in decided:
        out.add_column(name, no_wrap=True)
    for layer in layers:
        row = [str(layer.index)]
        if exponents is not None:
            found = [exponents[module] for module in layer.all_modules]
            values = [getattr(e, estimator) for e in found]
            row += [f"{mean(values):.3f}", f"{min(values):.2f}-{max(values):.2f}"]
            row += [f"{mean(getattr(e, other) for e in found):.3f}"]
        for counts in decided.values():
            numbers = of_layer(layer, counts)
            bar = "█" * round(fmean(counts[module] for module in layer.modules) * min(1, 20 / most))
            row.append(f"{numbers[0]}-{numbers[-1]} {bar}" if len(numbers) > 1 else f"{numbers[0]:>2} {bar}")
        out.add_row(*row)
    blank = [""] * (3 if exponents is not None else 0)
    out.add_row("sum", *blank, *(f"{total(layers, counts):g}" for counts in decided.values()), style="bold")
    return out


def markdown(layers: Sequence[LayerTargets], counts: Counts, alphas: Sequence[float] | None = None) -> str:
    """The table of one rule for TensorBoard's text page."""
    rows = ["| layer | alpha | experts |", "| ---: | ---: | ---: |"]
    for i, layer in enumerate(layers):
        alpha = "" if alphas is None else f"{alphas[i]:.3f}"
        rows.append(f"| {layer.index} | {alpha} | {', '.join(map(str, of_layer(layer, counts)))} |")
    return "\n".join([*rows, f"| sum | | {total(layers, counts):g} |"])


def figure(
    layers: Sequence[LayerTargets], decided: Mapping[str, Counts], alphas: Sequence[float] | None = None
) -> Figure:
    """Bars of experts per layer, one colour per rule, with the exponent as a line above the same layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    out = Figure(figsize=(max(6.0, 0.3 * len(layers) + 2), 3.6), layout="constrained")
    FigureCanvasAgg(out)
    axis = out.subplots()
    width = 0.8 / len(decided)
    for i, (name, counts) in enumerate(decided.items()):
        heights = [fmean(counts[module] for module in layer.modules) for layer in layers]
        axis.bar([x + (i + 0.5) * width - 0.4 for x in range(len(layers))], heights, width, label=name)
    axis.set_xticks(range(len(layers)), [str(layer.index) for layer in layers], fontsize=7)
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("experts")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axis.get_legend_handles_labels()
    if alphas is not None:
        right = axis.twinx()
        right.plot(range(len(layers)), alphas, color="black", marker=".", linewidth=1, label="exponent alpha")
        right.set_ylabel("alpha")
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    out.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return out


def as_config(layers: Sequence[LayerTargets], counts: Counts) -> dict[str, Any]:
    """The decision as a piece of configuration."""
    experts: Any = layer_list(layers, counts) or dict(counts)
    return {"model": {"adapter": {"allocation": {"class_path": "list", "init_args": {"experts": experts}}}}}


def write(
    file: Path,
    base: str,
    name: str,
    rule: Allocation,
    layers: Sequence[LayerTargets],
    counts: Counts,
    alphas: Sequence[float] | None,
) -> None:
    """A piece of configuration, with how it came about as comments."""
    options = ", ".join(f"{k}={v}" for k, v in registry.to_dict(rule).items() if k != "name" and v is not None)
    head = [f"Experts per layer of {base} by the rule {name!r}{f' ({options})' if options else ''}."]
    head.append(f"Use it with: python -m talklora_pl fit --config ... --config {file.name}")
    if alphas is not None:
        head.append("alpha per layer: " + ", ".join(f"{a:.4f}" for a in alphas))
    body = yaml.safe_dump(as_config(layers, counts), default_flow_style=None, sort_keys=False, width=110)
    file.write_text("".join(f"# {line}\n" for line in head) + body)
