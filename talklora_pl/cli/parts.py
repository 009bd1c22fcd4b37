"""All parts of an adapter with their options, those of plugins included."""

from __future__ import annotations

import inspect
from typing import Any

from rich.table import Table

from talklora_pl import registry
from talklora_pl.allocation import Allocation
from talklora_pl.balance import Balance
from talklora_pl.communication import Communication
from talklora_pl.data.rows import RowKind
from talklora_pl.experts import Experts
from talklora_pl.objectives import Objective
from talklora_pl.routers import Router

FAMILIES: dict[str, type[registry.Component]] = {
    "experts": Experts,
    "communication": Communication,
    "router": Router,
    "balance": Balance,
    "allocation": Allocation,
    "objective": Objective,
    "rows": RowKind,
}


def components() -> list[dict[str, Any]]:
    """One row per registered component: its key in the adapter's options, name, description and options."""
    rows = []
    for key, family in FAMILIES.items():
        for name in registry.names(family):
            cls = registry.get(family, name)
            rows.append(
                {
                    "family": key,
                    "name": name,
                    "description": (inspect.getdoc(cls) or "").split("\n")[0],
                    "options": [{"name": n, "type": t, "default": d} for n, t, d in registry.options(cls)],
                }
            )
    return rows


def components_table() -> Table:
    """The same for a terminal."""
    table = Table(title="Parts of an adapter", show_lines=True)
    table.add_column("part", no_wrap=True)
    table.add_column("what it is", overflow="fold", ratio=1)
    table.add_column("options: type = default", overflow="fold", ratio=1)
    for row in components():
        options = "\n".join(f"{o['name']}: {o['type']} = {o['default']}" for o in row["options"])
        table.add_row(f"{row['family']}\n  {row['name']}", row["description"], options)
    return table
