"""Rows of `prompt` and `completion`."""

from __future__ import annotations

from dataclasses import dataclass

from talklora_pl.data.rows import Example, Row, RowKind
from talklora_pl.registry import register


@register("completion")
@dataclass
class Completion(RowKind):
    """A prompt and its completion."""

    question = ("prompt",)
    answer = ("completion",)

    def read(self, row: Row) -> Example:
        prompt = row.text("prompt", empty=True)  # empty: plain text to continue
        answers = row.answers("completion")
        return Example(prompt=prompt, answers=answers, label=0 if answers else None)
