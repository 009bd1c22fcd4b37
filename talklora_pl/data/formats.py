"""How a prompt is written as text: by the name of a format, or by a template of one's own.

A template is any text with ``{prompt}`` (and, if wanted, ``{input}``). The answer follows it, after one space where the
template does not end in white space. What comes after the last place holder is the *response marker*: truncation keeps
it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from talklora_pl.data.example import Example

# format -> (template, template where there is an input)
_PLACES = re.compile(r"\{\{(\w+)\}\}|\{(prompt|input)\}")  # {{name}} stands for the text {name}
TEMPLATES: dict[str, tuple[str, str | None]] = {
    # prompt and completion exactly as they are
    "plain": ("{prompt}", None),
    # what a small model can learn: the answer itself, not its number
    "cloze": ("Question: {prompt}\nAnswer:", "Question: {prompt}\n{input}\nAnswer:"),
    # LLM-Adapters (Hu et al. 2023), after Stanford Alpaca; the two spaces are theirs
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.  \n\n"
        "### Instruction:\n{prompt}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.  \n\n"
        "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
}
NAMES = (*TEMPLATES, "chat")


class Written(NamedTuple):
    """A written prompt, its answers as they follow it, and the end of it that must not be cut off."""

    prompt: str
    answers: list[str]
    marker: str


def write(example: Example, name: str) -> Written:
    """Write a prompt and its answers in a format (other than `chat`, which the tokenizer's template writes)."""
    template, with_input = TEMPLATES.get(name, (name, None))
    template = (with_input or template) if example.input else template
    values = {"prompt": example.prompt, "input": example.input}
    if example.input and "{input}" not in template:
        values["prompt"] += "\n" + example.input
    parts, marker = _parts(template)
    prompt = "".join([values[part] if place else part for part, place in parts])
    space = " " if name != "plain" and not template[-1].isspace() else ""
    return Written(prompt, [space + answer for answer in example.answers], marker)


@cache
def _parts(template: str) -> tuple[list[tuple[str, bool]], str]:
    """The parts of a template, each with whether it is the name of a place, and what comes after the last place."""
    parts: list[tuple[str, bool]] = []
    at = last = 0
    for match in _PLACES.finditer(template):
        parts += [(template[at : match.start()], False), (f"{{{match[1]}}}", False) if match[1] else (match[2], True)]
        at = match.end()
        last = at if match[2] else last
    return [*parts, (template[at:], False)], template[last:]
