"""Private names of other libraries stand in ``talklora_pl/internals`` and nowhere else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "jsonargparse",
    "lightning",
    "peft",
    "torch",
    "transformers",
    "trl",
}
STABLE = {
    # torch: the same since its first versions, and what every library of its kind rests on
    *(
        "_apply",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_buffers",
        "_foreach_copy_",
        "_foreach_mul",
        "_foreach_norm",
        "_forward_hooks",
        "_forward_pre_hooks",
    ),
    *("_modules", "_parameters"),
    *("_fields", "_replace"),  # of a named tuple, documented
    "_exit",  # of os, documented
}
KEYS = {"_name_or_path", "_from_auto", "_commit_hash"}
"""Words of files and of keyword arguments, where no attribute of that name is meant."""
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def private_uses(root: Path) -> list[str]:
    """``file:line name`` of every use in the package under `root`, outside of ``internals``."""
    files = [*(root / "talklora_pl").rglob("*.py"), *(root / "callbacks").rglob("*.py")]
    return [
        f"{file.relative_to(root)}:{line} {name}"
        for file in sorted(files)
        if "internals" not in file.parts
        for line, name in sorted(set(uses(ast.parse(file.read_text()))))
    ]


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports, attributes of anything but ourselves, names in strings, and what a class takes from a foreign parent."""
    own = set(_defined(tree))
    lists = (node.elts for node in ast.walk(tree) if isinstance(node, ast.Tuple))
    keys = {id(word) for words in lists for word in words if isinstance(word, ast.Constant) and word.value in KEYS}
    keys |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] in FOREIGN:
                yield from ((node.lineno, part) for part in module.split(".") if _private(part))
                yield from ((node.lineno, name.name) for name in names if _private(name.name))
            case ast.Import(names=names):
                parts = [p for name in names if name.name.split(".")[0] in FOREIGN for p in name.name.split(".")]
                yield from ((node.lineno, part) for part in parts if _private(part))
            case ast.Attribute(value=value, attr=name) if _private(name):
                ours = isinstance(value, ast.Name) and value.id in ("self", "cls")
                if not ours and (name not in own or ast.unparse(value).split(".")[0] in ("L", "trainer", "super()")):
                    yield node.lineno, name
            case ast.Constant(value=str(name)) if _private(name) and id(node) not in keys:
                yield node.lineno, name
            case ast.ClassDef():
                yield from _inherited(node, tree)


def _private(name: str) -> bool:
    return PRIVATE.fullmatch(name) is not None and name not in STABLE


def _defined(tree: ast.Module) -> Iterator[str]:
    """Private names that this file gives to its own functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def _inherited(definition: ast.ClassDef, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private names of foreign parents that a class replaces or reads as its own."""
    parents = [p for base in definition.bases if (p := _foreign_class(base, tree)) is not None]
    source = "\n".join(_source(c) for parent in parents for c in parent.__mro__)
    if not source:
        return
    for node in ast.walk(definition):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name) | ast.FunctionDef(name=name):
                if _private(name) and re.search(rf"(self\.|def |^    ){name}\b", source, re.MULTILINE):
                    yield node.lineno, name


def _foreign_class(base: ast.expr, tree: ast.Module) -> Any:
    first, *rest = ast.unparse(base).split("[")[0].split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for name in node.names:
                if (name.asname or name.name) == first:
                    module = node.module or "" if isinstance(node, ast.ImportFrom) else name.name
                    if module.split(".")[0] not in FOREIGN:
                        return None
                    found: Any = importlib.import_module(module)
                    for part in [name.name, *rest] if isinstance(node, ast.ImportFrom) else rest:
                        found = getattr(found, part)
                    return found if isinstance(found, type) else None
    return None


def _source(c: type) -> str:
    module = c.__module__.split(".")
    return inspect.getsource(c) if module[0] in FOREIGN and module[:2] != ["torch", "_C"] else ""


def test_private_names_of_other_libraries_stay_behind_the_wall() -> None:
    assert private_uses(ROOT) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from lightning.x import _y", ["_y"]),
        ("import jsonargparse._typehints as t", ["_typehints"]),
        ("def f(trainer): trainer.fit_loop._should_accumulate()", ["_should_accumulate"]),
        ("def f(config): getattr(config, '_commit_hash', None)", ["_commit_hash"]),
        (
            "from lightning.pytorch.callbacks import ModelCheckpoint\n"
            "class C(ModelCheckpoint):\n  def _save_checkpoint(self): pass\n  def _mine(self): pass",
            ["_save_checkpoint"],
        ),
        ("import lightning as L\nclass C(L.LightningModule):\n  def f(self): return self._trainer", ["_trainer"]),
        ("class C:\n  def _mine(self): pass\ndef f(c): c._mine()", []),
        ("def f(module): return module._parameters", []),
    ],
)
def test_the_scan_sees(code: str, found: list[str]) -> None:
    assert [name for _, name in uses(ast.parse(code))] == found


if __name__ == "__main__":
    import sys

    print(*(found := private_uses(Path(sys.argv[1]))), len(found), sep="\n")
