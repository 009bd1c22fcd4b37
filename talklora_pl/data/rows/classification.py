"""Rows of `text`, maybe with a `text_pair`, and `label`: index or name of the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from talklora_pl.data.rows import Example, Row, RowKind
from talklora_pl.registry import register

if TYPE_CHECKING:
    from talklora_pl.data.tokens import Tokenize, Tokens


@register("classification")
@dataclass
class ClassRows(RowKind):
    """A text, or two, and the class."""

    question = ("text",)
    answer = ("label",)
    optional = ("text_pair",)
    by_chat = False
    gives = "class"

    def read(self, row: Row) -> Example:
        label = row.label("classes", row.num_classes, row.classes, [])
        return Example(prompt=row.text("text"), pair=row.text("text_pair", required=False), label=label)

    def tokens(self, example: Example, format: str, tokenize: Tokenize) -> Tokens:
        return tokenize.pair(example, format) if example.pair else tokenize.text(example, format)
