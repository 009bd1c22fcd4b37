"""What a row is. Every kind becomes the same thing: a prompt (or a conversation) and one or several answers.

| rows             | fields                                                                                        |
|------------------|-----------------------------------------------------------------------------------------------|
| `instruction`    | `instruction`, `output`, optional `input`                                                     |
| `completion`     | `prompt`, `completion`                                                                        |
| `chat`           | `messages`: list of `{role, content}`, the last by the assistant                              |
| `choice`         | `question`, `choices`: list of texts, `label`: index, text or letter of the right one         |
| `classification` | `text`, `label`: index or name of the class                                                   |

`id` and `task` are optional everywhere. Data to predict for needs no `output`, `completion`, `label` or last assistant
message.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from talklora_pl.data.source import BadRow, Source
from talklora_pl.errors import UserError
from talklora_pl.registry import did_you_mean


@dataclass
class Example:
    """A row in the common form.

    Attributes:
        prompt: what the model is asked; the text to classify.
        input: second part of the prompt (of `instruction` rows).
        messages: a conversation instead of a prompt; its last message is the answer, if by the assistant.
        answers: one completion, or all choices; empty where there is none.
        label: index of the right answer, or the class; None where unknown.
    """

    prompt: str = ""
    input: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    label: int | None = None


# kind -> fields of the question, fields of the answer (not needed to predict), further ones
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "instruction": (("instruction",), ("output",), ("input",)),
    "completion": (("prompt",), ("completion",), ()),
    "chat": (("messages",), (), ()),
    "choice": (("question", "choices"), ("label",), ("choice_labels",)),
    "classification": (("text",), ("label",), ()),
}


def check_kind(kind: str, columns: dict[str, Any]) -> None:
    """Raise UserError unless there are such rows and they have the mapped fields."""
    if kind not in FIELDS:
        raise UserError(f"unknown rows {kind!r}.{did_you_mean(kind, FIELDS)}")
    known = [*sum(FIELDS[kind], ()), "id", "task"]
    for name in columns:
        if name not in known:
            raise UserError(f"columns: {kind} rows have no field {name!r}.{did_you_mean(name, known)}")


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
    """

    def __init__(
        self,
        source: Source,
        require_answers: bool = True,
        classes: list[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.kind = source.rows or "completion"
        self.columns, self.require_answers, self.classes = source.columns, require_answers, classes
        self.num_classes = len(classes) if classes else num_classes

    def __call__(self, row: dict[str, Any]) -> Example:
        """Raises BadRow: a field is missing, empty or of a wrong type, a label out of range."""
        return getattr(self, f"_{self.kind}")(row)

    def _column(self, name: str) -> str:
        column = self.columns.get(name, name)
        return column if isinstance(column, str) else ", ".join(column)

    def mapped(self) -> dict[str, str]:
        """Columns that the user names and that must be somewhere in the data -> their fields."""
        optional = () if self.require_answers else FIELDS[self.kind][1]
        lists = {f: [c] if isinstance(c, str) else c for f, c in self.columns.items() if f not in optional}
        return {column: name for name, columns in lists.items() for column in columns}

    def get(self, row: dict[str, Any], name: str, required: bool = True) -> Any:
        """Value of a field; None where it is absent or null."""
        column = self.columns.get(name, name)
        if isinstance(column, list):
            return [self._lookup(row, part, required, name) for part in column]
        return self._lookup(row, column, required, name)

    def _lookup(self, row: dict[str, Any], column: str, required: bool, name: str) -> Any:
        value = find(row, column)
        if required and value is ABSENT:
            there = ", ".join(map(repr, row)) or "nothing"
            hint = "" if name in self.columns else f"; map it with columns: {{{name}: ...}}"
            raise BadRow(f"is missing (the row has {there}){hint}", column)
        if required and value is None:
            raise BadRow("is null", column)
        return None if value is ABSENT else value

    def text(self, row: dict[str, Any], name: str, required: bool = True, empty: bool = False) -> str:
        """Value of a text field; numbers are no text, so that a wrong column is noticed."""
        value = self.get(row, name, required)
        if value is None:
            return ""
        return self._text(value, self._column(name), empty or not required)

    def _text(self, value: Any, column: str, empty: bool = False) -> str:
        if not isinstance(value, str):
            raise BadRow(f"must be text, got {type(value).__name__}", column)
        if not value.strip() and not empty:
            raise BadRow("is empty", column)
        try:
            value.encode()
        except UnicodeEncodeError:  # "\ud800" is valid in JSON
            raise BadRow("holds half a surrogate pair, which is no text", column) from None
        return value

    def _answer(self, row: dict[str, Any], name: str) -> list[str]:
        answer = self.text(row, name, required=self.require_answers)
        return [answer] if answer else []

    def _instruction(self, row: dict[str, Any]) -> Example:
        prompt, extra = self.text(row, "instruction"), self.text(row, "input", required=False)
        answers = self._answer(row, "output")
        return Example(prompt=prompt, input=extra, answers=answers, label=0 if answers else None)

    def _completion(self, row: dict[str, Any]) -> Example:
        prompt = self.text(row, "prompt", empty=True)  # empty: plain text to continue
        answers = self._answer(row, "completion")
        return Example(prompt=prompt, answers=answers, label=0 if answers else None)

    def _chat(self, row: dict[str, Any]) -> Example:
        column, messages = self._column("messages"), self._list(row, "messages")
        for i, message in enumerate(messages):
            place = f"{column}[{i}]"
            if not isinstance(message, dict):
                raise BadRow("must be an object {role, content}", place)
            role = message.get("role")
            if role not in ("system", "user", "assistant"):
                raise BadRow(f"must be system, user or assistant, got {_short(role)}", f"{place}.role")
            self._text(message.get("content"), f"{place}.content", empty=role == "system")
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
        answered = messages[-1]["role"] == "assistant"
        if self.require_answers and not answered:
            raise BadRow("the last message must be the assistant's: it is what the model learns", column)
        answers = [messages[-1]["content"]] if answered else []
        return Example(messages=messages, answers=answers, label=0 if answered else None)

    def _choice(self, row: dict[str, Any]) -> Example:
        column = self._column("choices")
        choices = [self._text(c, f"{column}[{i}]") for i, c in enumerate(self._list(row, "choices"))]
        if len(choices) < 2:
            raise BadRow("needs at least two choices", column)
        listed = self.get(row, "choice_labels", required=False) is not None
        label = self._label(
            row,
            [str(name) for name in self._list(row, "choice_labels")] if listed else [],
            [choices, [chr(ord("A") + i) for i in range(len(choices))]],
            len(choices),
        )
        return Example(prompt=self.text(row, "question"), answers=choices, label=label)

    def _classification(self, row: dict[str, Any]) -> Example:
        return Example(prompt=self.text(row, "text"), label=self._label(row, self.classes or [], [], self.num_classes))

    def _list(self, row: dict[str, Any], name: str) -> list[Any]:
        value = self.get(row, name)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a CSV cell
            try:
                value = json.loads(value)
            except json.JSONDecodeError as e:
                raise BadRow(f"broken JSON: {e}", self._column(name)) from None
        if not isinstance(value, list) or not value:
            raise BadRow(f"must be a list that is not empty, got {_short(value)}", self._column(name))
        return value

    def _label(self, row: dict[str, Any], listed: list[str], texts: list[list[str]], count: int | None) -> int | None:
        """Number of the right one of `count`.

        Names that the user has `listed` come first, and alone if there is a number among them. Else an integer is an
        index, and a text is all that it can be: one of the `texts`, or an index in a CSV cell. That must be one thing.
        """
        value, column = self.get(row, "label", required=self.require_answers), self._column("label")
        what = "choices" if self.kind == "choice" else "classes"
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if str(value) in listed:
            return listed.index(str(value))
        if isinstance(value, str):
            meant = {i for names in texts for i, name in enumerate(names) if name == value}
            if re.fullmatch(r"-?\d{1,9}", value.strip()) and (not meant or int(value) < (count or 0)):
                meant.add(int(value))
            if len(meant) > 1:
                raise BadRow(
                    f"{_short(value)} can mean each of the {what} {sorted(meant)} (counted from 0), as a text, letter "
                    "or index: give a letter, or in JSON the index as an integer",
                    column,
                )
            value = meant.pop() if meant else value
        if self.kind == "classification" and isinstance(value, str) and not listed:
            raise BadRow("is no index of a class; names of classes need data.labels", column)
        if any(name.isdecimal() for name in listed):
            raise BadRow(f"{_short(value)} is none of the {what}: {', '.join(listed)}", column)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadRow(f"{_short(value)} is neither an index nor one of the {what}", column)
        if value < 0 or (count is not None and value >= count):
            raise BadRow(f"{value} is out of range: there are {count} {what}, counted from 0", column)
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
