"""One row on its way: as an example, whatever kind of row it was, and as tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Example:
    """A row in the common form.

    Attributes:
        prompt: what the model is asked; the text to classify.
        input: second part of the prompt (of `instruction` rows).
        messages: a conversation instead of a prompt; its last message is the answer, if by the assistant.
        answers: one completion, or all choices; empty where there is none.
        label: index of the right answer, or the class; None where unknown.
        tools: functions that the assistant of a conversation may call.
        variables: what else the chat template is told.
        pair: second text to classify the first with.
        endings: answers to the conversation as turns of their own, where it has several: of `preference` rows.
    """

    prompt: str = ""
    input: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    label: int | None = None
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    pair: str = ""
    endings: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass
class Tokens:
    """One example as tokens.

    Attributes:
        input_ids: one sequence, or one per choice.
        labels: of the same shapes, -100 where there is no loss (not shifted); empty for classification.
        prompt_length: how many tokens of the first sequence come before the (last) answer: what generation starts from;
            0 where nothing is asked.
        cut: prompt tokens that did not fit.
        notices: what was left out or replaced, one sentence each.
        answer: what generation has to write, where that is not the answer of the row as it stands: a chat template may
            put thoughts before it, or write a call of a tool.
        token_type_ids: of the only sequence, where it is of two texts and the model tells them apart; else empty.
    """

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    prompt_length: int = 0
    cut: int = 0
    notices: list[str] = field(default_factory=list)
    answer: str | None = None
    token_type_ids: list[int] = field(default_factory=list)
