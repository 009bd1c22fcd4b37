"""Rooms lie above one another: no module, and no folder, imports what imports it, be it for types alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(("talklora_pl", *path.relative_to(ROOT).with_suffix("").parts[folder == "talklora_pl" :])): path
    for folder in ("talklora_pl", "callbacks")
    for path in (ROOT / folder).rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file names in its imports, inside of functions and ``TYPE_CHECKING`` too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_circles() -> None:
    graph = {name: {to for to in imported(path) if to in MODULES} - {name} for name, path in MODULES.items()}
    assert "talklora_pl.adapter.inject" in graph["talklora_pl.module"] | graph["talklora_pl.adapter"]  # edges are seen
    TopologicalSorter(graph).prepare()  # raises CycleError
