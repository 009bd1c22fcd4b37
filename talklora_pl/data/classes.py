"""The classes of a classifier: listed by the user, kept by a checkpoint, or found in the training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from talklora_pl.data.prepare import resolve_source
from talklora_pl.data.rows import find, listing
from talklora_pl.data.source import Reader, Source
from talklora_pl.errors import UserError
from talklora_pl.objectives import Objective
from talklora_pl.paths import expand
from talklora_pl.strict import read_json


@dataclass(frozen=True)
class Classes:
    """How many classes there are, and their names, if they have any."""

    count: int
    names: list[str]


def listed(labels: list[str] | str | None) -> list[str] | None:
    """The names that `data.labels` gives, itself or in a JSON file.

    Raises:
        UserError: the file holds no list of names.
    """
    if not isinstance(labels, str):
        return labels
    try:
        names = read_json(Path(expand(labels)).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"data.labels: {labels!r} is not a readable JSON file: {e}") from e
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"data.labels: {labels!r} must hold a list of names.")
    return names


def decide(
    given: list[str] | None,
    num_labels: int | None,
    config: Any,
    kept: Mapping[str, Any],
    sources: Sequence[Source],
    objective: Objective,
) -> tuple[int, list[str], bool]:
    """Number and names of the classes, and whether they are those of training data.

    Args:
        given: names that the user lists.
        num_labels: how many classes the user wants.
        config: of the base.
        kept: what a checkpoint says of them, if a later stage is run from one.
        sources: training data that they may be looked for in.
        objective: whose rows these are.

    Raises:
        UserError: these contradict each other.
    """
    if given:
        if num_labels not in (None, len(given)):
            raise UserError(f"data.labels: {len(given)} classes, but model.base.num_labels is {num_labels}.")
        return len(given), given, False
    if kept:
        return kept["num_classes"], kept["class_names"], bool(kept["class_names"])
    if found := collect(sources, objective, num_labels, list(config.id2label.values())):
        return found.count, found.names, bool(found.names)
    return num_labels or config.num_labels, [], False


_found: dict[tuple[Any, ...], tuple[set[str], list[str]]] = {}


def collect(
    sources: Sequence[Source], objective: Objective, num_labels: int | None = None, known: Sequence[str] = ()
) -> Classes | None:
    """The classes that the labels of training data name. None: there is no label.

    Labels 0, 1, ... are classes as they are. All others are names, in the order of the data set's ``ClassLabel``, or of
    ``known``, or sorted (numbers by size).

    Args:
        sources: whose rows; one that cannot be read is passed over, since whoever prepares it says why.
        objective: whose rows they are.
        num_labels: how many classes the user wants.
        known: names of the classes that the base has already.

    Raises:
        UserError: one class alone, or another number than the user wants.
    """
    labels: set[str] = set()
    listed: list[list[str]] = []
    for source in sources:
        with suppress(UserError):
            found, names = _labels(source, objective)
            labels |= found
            listed.append(names)
    if not labels:
        return None
    names = _sorted(labels)
    if listed[0] and all(names == listed[0] for names in listed):
        names = listed[0]
    elif all(map(_is_number, names)):
        numbers = list(map(int, names))
        if numbers[0] >= 0 and (
            numbers == list(range(len(numbers))) if num_labels is None else numbers[-1] < num_labels
        ):
            _refuse_one(names if num_labels is None else [])
            return Classes(num_labels or len(numbers), [])
    _refuse_one(names)
    if labels <= set(known):
        names = list(known)
    if num_labels not in (None, len(names)):
        raise UserError(
            f"model.base.num_labels: {num_labels}, but the training data have {len(names)} classes ({listing(names)}). "
            "Leave it out, or list all classes in data.labels."
        )
    return Classes(len(names), names)


def _labels(source: Source, objective: Objective) -> tuple[set[str], list[str]]:
    """All labels of a source as text, and the names of its classes, if it says them."""
    source = resolve_source(source, objective)
    column = source.columns.get("label", "label")
    reader = Reader(source, str(column))
    key = (reader.identity, column, source.limit, source.path)
    if key not in _found:
        rows = islice(reader, source.limit)
        names = (_name(find(row, str(column))) for _, row in rows if isinstance(row, dict))
        _found[key] = {name for name in names if name is not None}, reader.class_names
    return _found[key]


def _name(label: Any) -> str | None:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label) if isinstance(label, int) or (isinstance(label, str) and label.strip()) else None


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii() and str(int(name)) == name


def _sorted(labels: set[str]) -> list[str]:
    return sorted(labels, key=int) if all(map(_is_number, labels)) else sorted(labels)


def _refuse_one(names: list[str]) -> None:
    if len(names) == 1:
        raise UserError(f"data.train: every row has the label {names[0]!r}, so there is nothing to tell apart.")
