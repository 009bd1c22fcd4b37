"""Rows of `instruction`, `output` and an optional `input`."""

from __future__ import annotations

from dataclasses import dataclass

from talklora_pl.data.rows import Example, Row, RowKind
from talklora_pl.registry import register


@register("instruction")
@dataclass
class Instruction(RowKind):
    """An instruction, an optional input, and the output."""

    question = ("instruction",)
    answer = ("output",)
    optional = ("input",)
    format = "alpaca"

    def read(self, row: Row) -> Example:
        prompt, extra = row.text("instruction"), row.text("input", required=False)
        answers = row.answers("output")
        return Example(prompt=prompt, input=extra, answers=answers, label=0 if answers else None)
