"""Rows of `completion` and what comes before it, the `prompt`; without one they are texts alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from talklora_pl.data.rows import ABSENT, Example, Row, RowKind, find
from talklora_pl.data.rows.text import pieces
from talklora_pl.data.source import BadRow
from talklora_pl.registry import register

if TYPE_CHECKING:
    from talklora_pl.data.tokens import Tokenize, Tokens


@register("completion")
@dataclass
class Completion(RowKind):
    """A prompt, which may be empty or absent, and its completion."""

    question = ()
    answer = ("completion",)
    optional = ("prompt",)

    def read(self, row: Row) -> Example:
        answers = row.answers("completion")
        prompt = row.text("prompt", required=False)
        if not prompt and not row.require_answers:
            raise BadRow("is missing or empty, so there is nothing to continue", row.column("prompt"))
        if find(row.values, row.column("prompt")) is ABSENT and (others := _texts_beside(row)):
            raise BadRow(
                f"is missing, and {' or '.join(map(repr, others))} may be it: map it with columns: {{prompt: ...}}, or "
                f"for no prompt say rows: text with columns: {{text: {row.column('completion')}}}",
                row.column("prompt"),
            )
        return Example(prompt=prompt, answers=answers, label=0 if answers else None)

    def sequences(self, example: Example, format: str, tokenize: Tokenize) -> Iterable[Tokens]:
        if example.prompt or format != "plain":
            return super().sequences(example, format, tokenize)
        return pieces(example.answers[0], tokenize)


def _texts_beside(row: Row) -> list[str]:
    """Columns with a text that no field is read from."""
    used = {row.column(name).split(".")[0] for name in ("completion", "prompt", "id", "task")}
    return [name for name, value in row.values.items() if name not in used and isinstance(value, str) and value.strip()]
