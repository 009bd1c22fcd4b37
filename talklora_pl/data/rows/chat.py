"""Rows of `messages`, the last by the assistant: `{role, content}` and further keys, or ShareGPT's `{from, value}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from talklora_pl.data.rows import ABSENT, Example, Row, RowKind, check_text, find, short
from talklora_pl.data.source import BadRow
from talklora_pl.registry import register
from talklora_pl.strict import read_json

ROLES = ["system", "developer", "user", "assistant", "tool", "function", "ipython", "observation", "environment"]
ROLES += ["tool_results", "document", "documents"]
# ShareGPT's names
FROM = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
FROM |= dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool")
CALLS = ("function_call", "tool_call")  # turns of their own there


@register("chat")
@dataclass
class Chat(RowKind):
    """A conversation of system, user, assistant and tools."""

    question = ("messages",)
    optional = ("conversations", "prompt", "completion", "system", "tools", "documents", "chat_template_kwargs")
    format = "chat"
    by_template = False

    def read(self, row: Row) -> Example:
        names = ["messages"]
        if "messages" not in row.columns and find(row.values, "messages") in (ABSENT, None):
            others = (["conversations"], ["prompt", "completion"], ["prompt"])  # of ShareGPT, of TRL
            names = next((there for there in others if all(row.get(name, False) for name in there)), names)
        column = row.column(names[-1])
        messages = []
        for name in names:
            turns = [read_turn(turn, f"{row.column(name)}[{i}]") for i, turn in enumerate(row.items(name))]
            if name == "prompt":  # what is in it is not learned
                turns = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in turns]
            messages += turns
        if system := row.text("system", required=False):
            if messages[0]["role"] == "system":
                raise BadRow("is a second system text: the messages have one", row.column("system"))
            messages.insert(0, {"role": "system", "content": system})
        answered = messages[-1]["role"] == "assistant"
        if row.require_answers and not answered:
            raise BadRow("the last message must be the assistant's: it is what the model learns", column)
        variables = _parsed(row.get("chat_template_kwargs", required=False)) or {}
        if not isinstance(variables, dict):
            raise BadRow(f"must be an object, got {short(variables)}", row.column("chat_template_kwargs"))
        if documents := _parsed(row.get("documents", required=False)):
            variables = {**variables, "documents": documents}
        answers = [answer_text(messages[-1])] if answered else []
        return Example(
            messages=messages,
            answers=answers,
            label=0 if answered else None,
            tools=read_tools(row),
            variables=variables,
        )


def read_turn(message: Any, place: str) -> dict[str, Any]:
    """A turn in the form {role, content}. Raises BadRow."""
    if not isinstance(message, dict):
        raise BadRow("must be an object {role, content}", place)
    turn = {key: value for key, value in message.items() if value is not None}
    if "role" not in turn and "from" in turn:
        said = turn.pop("from")
        role = FROM.get(said, said) if isinstance(said, str) else said
        content = turn.pop("value", turn.pop("content", None))
        turn = {"role": role, "content": content, **turn}
        if role in CALLS:
            turn |= {"role": "assistant", "content": None, "tool_calls": _calls(content, place)}
    role = turn.get("role")
    if role not in ROLES:
        raise BadRow(f"must be one of {', '.join(ROLES[:5])}, ..., got {short(role)}", f"{place}.role")
    if isinstance(turn.get("tool_calls"), str):
        turn["tool_calls"] = _parsed(turn["tool_calls"])
    if not turn.get("tool_calls"):
        turn.pop("tool_calls", None)
    elif not isinstance(turn["tool_calls"], list) or not all(isinstance(call, dict) for call in turn["tool_calls"]):
        raise BadRow("must be a list of objects", f"{place}.tool_calls")
    content = turn.get("content")
    if content is None and ("tool_calls" in turn or "function_call" in turn):
        return turn
    if isinstance(content, list) and content:
        for i, part in enumerate(content):
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise BadRow(f"is a part of type {short(kind)}; only text can be read", f"{place}.content[{i}]")
            check_text(part.get("text") if isinstance(part, dict) else part, f"{place}.content[{i}].text", empty=True)
        return turn
    check_text(content, f"{place}.content", empty=role not in ("user", "assistant") or "tool_calls" in turn)
    return turn


def answer_text(turn: dict[str, Any]) -> str:
    """The text of an answer, to compare with."""
    content = turn.get("content") or ""
    parts = [content] if isinstance(content, str) else content
    return "\n".join(part if isinstance(part, str) else part["text"] for part in parts)


def _parsed(value: Any) -> Any:
    """JSON in a cell as what it stands for; anything else as it is."""
    try:
        return read_json(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        return value


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    call = _parsed(value)
    if not isinstance(call, dict) or "name" not in call:
        raise BadRow(f"must be the JSON of a call (name, arguments), got {short(value)}", f"{place}.value")
    return [{"type": "function", "function": call}]


def read_tools(row: Row) -> list[Any] | None:
    value, column = _parsed(row.get("tools", required=False)), row.column("tools")
    tools = [_parsed(tool) for tool in value] if isinstance(value, list) else value
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow(f"must be a list of objects, got {short(value)}", column)
    return tools or None
