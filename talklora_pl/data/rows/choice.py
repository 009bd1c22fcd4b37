"""Rows of `question`, `choices` and `label`: index, text or letter of the right one."""

from __future__ import annotations

from dataclasses import dataclass

from talklora_pl.data.rows import Example, Row, RowKind, check_text
from talklora_pl.data.source import BadRow
from talklora_pl.registry import register


@register("choice")
@dataclass
class Choice(RowKind):
    """A question with several choices, one of them right."""

    question = ("question", "choices")
    answer = ("label",)
    optional = ("choice_labels",)
    format = "cloze"

    def read(self, row: Row) -> Example:
        column = row.column("choices")
        choices = [check_text(c, f"{column}[{i}]") for i, c in enumerate(row.items("choices"))]
        if len(choices) < 2:
            raise BadRow("needs at least two choices", column)
        listed = row.get("choice_labels", required=False) is not None
        names = [str(name) for name in row.items("choice_labels")] if listed else []
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        label = row.label("choices", len(choices), names, [choices, letters])
        return Example(prompt=row.text("question"), answers=choices, label=label)
