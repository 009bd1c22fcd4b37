"""A conversation: what its turns hold, which are learned, and other forms of a turn that a template may want."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from talklora_pl.data.encode import END
from talklora_pl.data.source import BadRow

Turn = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
# keys of a turn that may be left out where the template does not write them, if that is said
MINOR = (*REASONING, "name", "id", "tool_call_id")
LEARN = ("weight", "train", "loss")  # whether to learn a turn, by different names
MARK = chr(END)  # stands where a text ends; data do not hold it


@dataclass
class Conversation:
    """Turns and what else a template may read.

    Attributes:
        turns: `role`, `content` and further keys; null is as absent.
        tools: descriptions of functions, in the form that the template reads (JSON schema).
        variables: further variables of the template, such as `documents` or `enable_thinking`.
    """

    turns: list[Turn]
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def is_learned(turn: Turn) -> bool:
    """Whether a turn is to be learned, if it is an answer. Raises BadRow: by half."""
    for key in LEARN:
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            raise BadRow(f"has {key}: {value!r} in a turn; an answer is learned (1) or not (0)")
        if value is not None and not value:
            return False
    return True


def text_of(turn: Turn) -> str:
    """The text of a turn's content."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else (_part_text(content[-1]) if content else "")


def _part_text(part: Any) -> str:
    return part if isinstance(part, str) else part["text"]


def with_mark(turn: Turn) -> Iterator[Turn]:
    """The turn with a mark after a text that stands at its end: the last call's arguments or name, or the content."""
    if calls := turn.get("tool_calls"):
        function = calls[-1].get("function", calls[-1])
        for key in ("arguments", "name"):
            marked, done = _mark_last(function.get(key))
            new = {**function, key: marked}
            if done:
                yield {
                    **turn,
                    "tool_calls": [*calls[:-1], {**calls[-1], "function": new} if "function" in calls[-1] else new],
                }
    if turn.get("content"):
        yield {**turn, "content": _mark_last(turn["content"])[0]}


def _mark_last(value: Any) -> tuple[Any, bool]:
    """The value with a mark after the last text in it, and whether there is any."""
    if isinstance(value, str):
        return value.rstrip() + MARK, True
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in reversed([key for key in keys if key != "type"]):
        new, done = _mark_last(value[key])
        if done:
            out = dict(value) if isinstance(value, dict) else list(value)
            out[key] = new
            return out, True
    return value, False


def with_content(turn: Turn) -> Turn:
    """The turn with an empty content if it has none."""
    return turn if "content" in turn else {**turn, "content": ""}


def other_arguments(turn: Turn) -> Turn:
    """The turn with the arguments of its calls as JSON where they are objects, as objects where they are JSON."""
    calls = []
    for call in turn.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments")
        try:
            other = json.loads(arguments) if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        except (ValueError, RecursionError):
            other = arguments
        function = {**function, "arguments": other}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**turn, "tool_calls": calls} if calls else turn


def json_arguments(turn: Turn) -> list[str]:
    """The arguments of calls that are JSON as text."""
    functions = [call.get("function", call) for call in turn.get("tool_calls") or []]
    return [text for function in functions if isinstance(text := function.get("arguments"), str)]
