"""Rows of `text` and `label`: index or name of the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from talklora_pl.data.rows import Example, Row, RowKind
from talklora_pl.registry import register

if TYPE_CHECKING:
    from talklora_pl.data.tokens import Tokenize, Tokens


@register("classification")
@dataclass
class Classification(RowKind):
    """A text and its class."""

    question = ("text",)
    answer = ("label",)
    by_chat = False
    gives = "class"

    def read(self, row: Row) -> Example:
        return Example(prompt=row.text("text"), label=row.label("classes", row.num_classes, row.classes, []))

    def tokens(self, example: Example, format: str, tokenize: Tokenize) -> Tokens:
        return tokenize.text(example, format)
