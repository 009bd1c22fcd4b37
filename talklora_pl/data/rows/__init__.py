"""What a row is. Every kind becomes the same thing: a prompt (or a conversation) and one or several answers.

One file in this folder is one kind of rows. `id` and `task` are optional in all of them. Data to predict for needs no
fields of the answer.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from talklora_pl import registry
from talklora_pl.data import formats
from talklora_pl.data.example import Example
from talklora_pl.data.source import BadRow, Source
from talklora_pl.errors import UserError
from talklora_pl.strict import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from talklora_pl.data.tokens import Tokenize, Tokens


class RowKind(registry.Component):
    """Family base: what a row is and what it becomes. Chosen by name alone, so a kind has no options.

    Attributes:
        question: fields that every row has.
        answer: fields that rows to predict for may lack.
        optional: further fields.
        format: how it is written where nobody says.
        by_template, by_chat: whether it can be written by a template, by the tokenizer's chat template.
        gives: what its examples are, for the objective that takes them: `answers`, a `class`, or a word of your own.
    """

    family = "kind of rows"
    question: ClassVar[tuple[str, ...]]
    answer: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    format: ClassVar[str] = "plain"
    by_template: ClassVar[bool] = True
    by_chat: ClassVar[bool] = True
    gives: ClassVar[str] = "answers"

    @abstractmethod
    def read(self, row: Row) -> Example:
        """The example of a row. Raises BadRow: a field is missing, empty or of a wrong type, a label out of range."""

    def tokens(self, example: Example, format: str, tokenize: Tokenize) -> Tokens:
        """The tokens of an example, one sequence per answer. Raises BadRow: it has none, or too many."""
        return tokenize(example, format)

    def sequences(self, example: Example, format: str, tokenize: Tokenize) -> Iterable[Tokens]:
        """What becomes of an example: one row of sequences, or several rows, the pieces of a long text.

        Raises BadRow: as :meth:`tokens`."""
        return [self.tokens(example, format, tokenize)]


def check_format(name: str, kind: RowKind, has_template: bool = True) -> None:
    """Raise UserError unless `name` is a format (or a template) that can write such rows with this tokenizer."""
    if name not in formats.NAMES and "{prompt}" not in name:
        raise UserError(
            f"unknown format {name!r}.{registry.did_you_mean(name, formats.NAMES)} A template of your own must contain "
            "{prompt}."
        )
    if not kind.by_template and not kind.by_chat:
        if name != "plain":
            raise UserError(f"{kind.name} rows are read as they are; leave the format out or say plain, not {name!r}")
        return
    fields = (*kind.question, *kind.answer, *kind.optional)
    places = re.findall(r"(?<!\{)\{(\w+)\}", name) if name not in formats.NAMES else []
    if wrong := [p for p in places if p not in ("prompt", "input") or (p == "input" and "input" not in fields)]:
        raise UserError(
            f"format: no column fills {{{wrong[0]}}}: a template has {{prompt}}, and {{input}} for rows: instruction "
            f"(map your column to one of them). The text {{{wrong[0]}}} itself is written {{{{{wrong[0]}}}}}."
        )
    if not kind.by_template and name != "chat":
        raise UserError(f"{kind.name} rows need format: chat, not {name!r}")
    if not kind.by_chat and name == "chat":
        raise UserError(f"format: chat cannot write {kind.name} rows; use plain or a template with {{prompt}}")
    if name == "chat" and not has_template:
        other = ", or another format" if kind.by_template else ""
        raise UserError(
            "format: chat needs a tokenizer with a chat template, and this model's has none; name a model tuned for "
            f"chat (often called -Instruct or -it) as model.base.path{other}."
        )


def row_kind(name: str) -> RowKind:
    """The kind of that name. Raises UserError: there is none."""
    return registry.get(RowKind, name)()  # type: ignore[return-value]


ABSENT: Any = object()


def find(row: dict[str, Any], column: str) -> Any:
    """What a row holds in a column, or in ``outer.inner``; ABSENT where it has no such place."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
    return value


class RowReader:
    """Turns raw rows into examples.

    Args:
        source: gives the kind of rows and the names of the columns.
        require_answers: the answer must be there.
        classes: names of the classes, where `label` may be a name.
        num_classes: how many classes there are; None: any number.
        trained: the classes are those of the training data, and a label is one of their names.

    Raises:
        UserError: unknown kind, or it has no such fields.
    """

    def __init__(
        self,
        source: Source,
        require_answers: bool = True,
        classes: list[str] | None = None,
        num_classes: int | None = None,
        trained: bool = False,
    ) -> None:
        self.kind = row_kind(source.rows or "completion")
        self.columns, self.require_answers, self.classes = source.columns, require_answers, classes
        self.num_classes, self.trained = len(classes) if classes else num_classes, trained
        known = [*self.kind.question, *self.kind.answer, *self.kind.optional, "id", "task"]
        for name in self.columns:
            if name not in known:
                hint = registry.did_you_mean(name, known)
                raise UserError(f"columns: {self.kind.name} rows have no field {name!r}.{hint}")

    def __call__(self, values: dict[str, Any]) -> Example:
        """Raises BadRow: a field is missing, empty or of a wrong type, a label out of range."""
        try:
            return self.kind.read(Row(values, self))
        except BadRow as e:
            own = (*self.kind.question, *self.kind.answer)
            if not self.columns and not any(name in values for name in own) and (other := self._other(values)):
                e.problem += f", or say rows: {other}"
            raise

    def _other(self, values: dict[str, Any]) -> str | None:
        """Another kind that can read a row as it is."""
        for name in registry.names(RowKind):
            if (kind := row_kind(name)).gives == self.kind.gives:
                with suppress(BadRow):
                    kind.read(Row(values, self))
                    return name
        return None

    def used(self) -> set[str]:
        """Columns that rows are read from, whether they are there or not."""
        names = (*self.kind.question, *self.kind.answer, *self.kind.optional, "id", "task")
        columns = [column for name in names for column in _listed(self.columns.get(name, name))]
        return {*columns, *(column.split(".")[0] for column in columns)}

    def mapped(self) -> dict[str, str]:
        """Columns that the user names and that must be somewhere in the data -> their fields."""
        optional = () if self.require_answers else self.kind.answer
        lists = {f: _listed(c) for f, c in self.columns.items() if f not in optional}
        return {column: name for name, columns in lists.items() for column in columns}


class Row:
    """One raw row, asked for fields; the user may have mapped them to other columns.

    Every method raises BadRow where the row does not hold what is asked for.

    Attributes:
        require_answers: the answer must be there.
        classes: names of the classes, if the user lists them.
        num_classes: how many there are; None: any number.
        trained: they are those of the training data.
    """

    def __init__(self, values: dict[str, Any], reader: RowReader) -> None:
        self.values, self.columns, self.require_answers = values, reader.columns, reader.require_answers
        self.classes, self.num_classes, self.trained = reader.classes or [], reader.num_classes, reader.trained

    def column(self, name: str) -> str:
        """Where a field is, for a message."""
        column = self.columns.get(name, name)
        return column if isinstance(column, str) else ", ".join(column)

    def get(self, name: str, required: bool = True) -> Any:
        """Value of a field; None where it is absent or null."""
        column = self.columns.get(name, name)
        if isinstance(column, list):
            return [self._lookup(part, required, name) for part in column]
        return self._lookup(column, required, name)

    def _lookup(self, column: str, required: bool, name: str) -> Any:
        value = find(self.values, column)
        if required and value is ABSENT:
            there = ", ".join(map(repr, self.values)) or "nothing"
            hint = "" if name in self.columns else f"; map it with columns: {{{name}: ...}}"
            raise BadRow(f"is missing (the row has {there}){hint}", column)
        if required and value is None:
            raise BadRow("is null", column)
        return None if value is ABSENT else value

    def text(self, name: str, required: bool = True, empty: bool = False) -> str:
        """Value of a text field; numbers are no text, so that a wrong column is noticed."""
        value = self.get(name, required)
        if value is None:
            return ""
        return check_text(value, self.column(name), empty or not required)

    def answers(self, *names: str) -> list[str]:
        """Texts of the fields with answers; those that are there, where answers are not required."""
        return [text for name in names if (text := self.text(name, required=self.require_answers))]

    def items(self, name: str) -> list[Any]:
        """Value of a field that holds a list, which is not empty."""
        value = self.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a CSV cell
            try:
                value = read_json(value)
            except (ValueError, RecursionError) as e:
                raise BadRow(f"broken JSON: {e}", self.column(name)) from None
        if not isinstance(value, list) or not value:
            raise BadRow(f"must be a list that is not empty, got {short(value)}", self.column(name))
        return value

    def label(self, what: str, count: int | None, listed: list[str], texts: list[list[str]]) -> int | None:
        """Number of the right one of `count`, from the field `label`; None where it is unknown.

        Names that the user has `listed` come first, and alone if there is a number among them. Else an integer is an
        index, and a text is all that it can be: one of the `texts`, or an index in a CSV cell. That must be one thing.
        """
        value, column = self.get("label", required=self.require_answers), self.column("label")
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if str(value) in listed:
            return listed.index(str(value))
        if self.trained and listed:
            raise BadRow(f"{short(value)} is none of the {what} of the training data: {listing(listed)}", column)
        if isinstance(value, str):
            meant = {i for names in texts for i, name in enumerate(names) if name == value}
            if re.fullmatch(r"-?\d{1,9}", value.strip()) and (not meant or int(value) < (count or 0)):
                meant.add(int(value))
            if len(meant) > 1:
                raise BadRow(
                    f"{short(value)} can mean each of the {what} {sorted(meant)} (counted from 0), as a text, letter "
                    "or index: give a letter, or in JSON the index as an integer",
                    column,
                )
            value = meant.pop() if meant else value
        if isinstance(value, str) and not listed and not texts:
            raise BadRow(f"{short(value)} is no index of the {what}; names of {what} need data.labels", column)
        if any(name.isdecimal() for name in listed):
            raise BadRow(f"{short(value)} is none of the {what}: {listing(listed)}", column)
        if isinstance(value, bool) or not isinstance(value, int):
            known = f": {listing(listed)}" if listed else ""
            raise BadRow(f"{short(value)} is neither an index nor one of the {what}{known}", column)
        if value < 0 or (count is not None and value >= count):
            raise BadRow(f"{value} is out of range: there are {count} {what}, counted from 0", column)
        return value


def _listed(columns: str | list[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else columns


def check_text(value: Any, column: str, empty: bool = False) -> str:
    """The value, if it is text. Raises BadRow."""
    if not isinstance(value, str):
        turns = isinstance(value, list) and value and isinstance(value[0], dict)
        hint = " (turns of a conversation are rows: chat)" if turns else ""
        raise BadRow(f"must be text, got {type(value).__name__}{hint}", column)
    if not value.strip() and not empty:
        raise BadRow("is empty", column)
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" is valid in JSON
        raise BadRow("holds half a surrogate pair, which is no text", column) from None
    return value


def listing(names: Sequence[str]) -> str:
    """Names for a message, not too many of them."""
    more = f", ... ({len(names)} in all)" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


registry.import_siblings(__name__)
