"""Rows of `messages`: a list of `{role, content}`, the last by the assistant."""

from __future__ import annotations

from dataclasses import dataclass

from talklora_pl.data.rows import Example, Row, RowKind, check_text, short
from talklora_pl.data.source import BadRow
from talklora_pl.registry import register


@register("chat")
@dataclass
class Chat(RowKind):
    """A conversation of system, user and assistant."""

    question = ("messages",)
    format = "chat"
    by_template = False

    def read(self, row: Row) -> Example:
        column, messages = row.column("messages"), row.items("messages")
        for i, message in enumerate(messages):
            place = f"{column}[{i}]"
            if not isinstance(message, dict):
                raise BadRow("must be an object {role, content}", place)
            role = message.get("role")
            if role not in ("system", "user", "assistant"):
                raise BadRow(f"must be system, user or assistant, got {short(role)}", f"{place}.role")
            check_text(message.get("content"), f"{place}.content", empty=role == "system")
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
        answered = messages[-1]["role"] == "assistant"
        if row.require_answers and not answered:
            raise BadRow("the last message must be the assistant's: it is what the model learns", column)
        answers = [messages[-1]["content"]] if answered else []
        return Example(messages=messages, answers=answers, label=0 if answered else None)
