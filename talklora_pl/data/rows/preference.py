"""Rows of `prompt`, `chosen` and `rejected`: texts, or turns of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from talklora_pl.data.example import Example
from talklora_pl.data.rows import Row, RowKind
from talklora_pl.data.rows.chat import answer_text, read_tools, read_turn
from talklora_pl.data.source import BadRow
from talklora_pl.registry import register

if TYPE_CHECKING:
    from talklora_pl.data.tokens import Tokenize, Tokens

Turns = list[dict[str, Any]]


@register("preference")
@dataclass
class Preference(RowKind):
    """A prompt, the answer that was chosen and the one that was rejected. In `predict` the prompt alone is read."""

    question = ()
    answer = ("chosen", "rejected")
    optional = ("prompt", "tools")
    gives = "preference"

    def read(self, row: Row) -> Example:
        if not isinstance(row.get("chosen" if row.require_answers else "prompt"), list):
            answers = [row.text("chosen"), row.text("rejected")] if row.require_answers else []
            if len(set(answers)) == 1:
                raise BadRow("is the same text as chosen, so neither is preferred", row.column("rejected"))
            text = row.text("prompt", required=True)
            return Example(prompt=text, answers=answers, label=0 if answers else None)
        prompt = _prompt(row)
        if not row.require_answers:
            return Example(messages=prompt, tools=read_tools(row))
        endings = [_turns(row, name) for name in self.answer]
        if not prompt or prompt == endings[0][: len(prompt)]:  # the turns of the prompt are those that both begin with
            both = zip(*endings)
            common = next((i for i, (a, b) in enumerate(both) if a != b), min(map(len, endings)))
            shared, endings = endings[0][:common], [turns[common:] for turns in endings]
            if prompt and len(shared) < len(prompt):
                raise BadRow("does not begin with the turns of the prompt, as chosen does", row.column("rejected"))
            prompt = shared
        if not prompt:
            raise BadRow("is missing, and chosen and rejected begin with no common turn", row.column("prompt"))
        if endings[0] == endings[1]:
            raise BadRow("are the same turns as chosen, so neither is preferred", row.column("rejected"))
        for name, turns in zip(self.answer, endings):
            if not turns or turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
                raise BadRow("must be an answer: turns that begin and end with the assistant's", row.column(name))
        prompt = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in prompt]
        answers = [answer_text(turns[-1]) for turns in endings]
        return Example(messages=prompt, endings=endings, answers=answers, label=0, tools=read_tools(row))

    def tokens(self, example: Example, format: str, tokenize: Tokenize) -> Tokens:
        if example.messages and format != "chat":
            raise BadRow(f"is a list of turns, which the format {format!r} does not write; say format: chat", "chosen")
        return super().tokens(example, format, tokenize)


def _turns(row: Row, name: str) -> Turns:
    return [read_turn(turn, f"{row.column(name)}[{i}]") for i, turn in enumerate(row.items(name))]


def _prompt(row: Row) -> Turns:
    """The turns of the prompt; none where `chosen` and `rejected` have them. A text is the user's turn."""
    value = row.get("prompt", required=False)
    if isinstance(value, list):
        return _turns(row, "prompt")
    text = row.text("prompt", required=False)
    whole = row.get("chosen", required=False)
    first = whole[0] if isinstance(whole, list) and whole and isinstance(whole[0], dict) else {}
    begins = first.get("role", first.get("from")) not in ("assistant", "gpt")
    return [] if not text or begins else [{"role": "user", "content": text}]
