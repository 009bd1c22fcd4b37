"""What a tokenizer's chat template writes of a conversation, what it leaves out, how it opens and closes an answer."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from functools import cached_property
from typing import Any

from talklora_pl.data.encode import Encoder, alternatives
from talklora_pl.data.source import BadRow
from talklora_pl.data.turns import (
    LEARN,
    MARK,
    MINOR,
    REASONING,
    Conversation,
    Turn,
    other_arguments,
    text_of,
    with_content,
    with_mark,
)

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


class Template:
    """The program that is a tokenizer's chat template.

    Args:
        encoder: of that tokenizer.

    Attributes:
        ends: the token with which it ends a last answer; empty if it has none.
        opening: what ``add_generation_prompt`` adds.
        header: what stands before an answer all the same, where that adds nothing.
        before: texts that end where an answer begins.
        tails: texts after a last answer, and after an earlier one.
        closing: tokens in them.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self.ends: list[int] = []
        self.opening = self.header = ""
        self.before: list[str] = []
        self.tails: set[str] = set()
        self.closing: set[str] = set()
        self._takes_text = self._takes_parts = True
        self._probe()

    def write(self, conversation: Conversation, open: bool = False) -> tuple[Conversation, str]:
        """The conversation as the template takes it, and what it writes."""
        turns = [self._turn(turn) for turn in conversation.turns]
        protect = self.encoder.protect
        if taken := [name for name in conversation.variables if name in _reserved()]:
            raise BadRow(f"{taken[0]!r} cannot be a variable of the chat template")
        given = Conversation(turns, protect(conversation.tools), protect(conversation.variables))
        try:
            return given, self._render(given, open)
        except BadRow as e:
            # the arguments of a call are an object to some templates and its JSON to others; some want a content
            for change in (other_arguments, with_content, lambda turn: with_content(other_arguments(turn))):
                other = replace(given, turns=[change(turn) for turn in turns])
                if other.turns != turns and (text := self.attempt(other, other.turns, open)) is not None:
                    return other, text
            unread = {key for turn in turns for key in turn if key not in ("role", "content", *MINOR)} - self.words
            if unread:
                raise BadRow(_unread(min(unread))) from e
            raise

    def _turn(self, turn: Turn) -> Turn:
        """A turn as the template takes it: without null, without our keys, content as text or parts."""
        absent: tuple[Any, ...] = (None, [], {})
        turn = {key: value for key, value in turn.items() if value not in absent and key not in LEARN}
        turn |= self.encoder.protect({key: value for key, value in turn.items() if key != "role"})
        content = turn.get("content")
        if isinstance(content, list):
            texts = [part if isinstance(part, str) else part.get("text") for part in content]
            if any(not isinstance(text, str) for text in texts):
                raise BadRow("has content that is not text")
            if not self._takes_parts:
                turn["content"] = "\n".join(texts)
        elif isinstance(content, str) and not self._takes_text:
            turn["content"] = [{"type": "text", "text": content}]
        return turn

    def _render(self, given: Conversation, open: bool = False) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                given.turns, tools=given.tools, tokenize=False, add_generation_prompt=open, **given.variables
            )
        except Exception as e:  # a template is a program; many raise for an order of roles that they do not know
            raise BadRow(f"the chat template refuses these messages: {e}") from e
        return text + self.header if open else text

    def attempt(self, given: Conversation, turns: list[Turn], open: bool = False) -> str | None:
        """What it writes for these turns, with the tools and variables of a conversation; None where it refuses."""
        try:
            return self._render(replace(given, turns=turns), open) if turns else None
        except BadRow:
            return None

    def _probe(self) -> None:
        """How it opens and closes an answer, seen in a conversation of two questions and two answers."""
        q, a = MARK + "q", MARK + "a"
        turns: list[Turn] = [{"role": role, "content": text} for role, text in (("user", q), ("assistant", a))] * 2
        parts: list[Turn] = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        empty = Conversation([])
        by_text, by_parts = self.attempt(empty, turns[:2]), self.attempt(empty, parts[:2])
        if a not in (by_text or ""):
            self._takes_text, turns = a not in (by_parts or ""), parts
        self._takes_parts = by_parts is not None and (by_parts == by_text or not self._takes_text)
        whole, short, prompt = (self.attempt(empty, turns[:n]) or "" for n in (4, 2, 1))
        opened = self.attempt(empty, turns[:1], open=True) or ""
        if not all(text in short for text in (q, a)):
            return
        added = alternatives(self.encoder.added)
        middle, tail = _between(short, q, a), short[short.index(a) + len(a) :]
        if end := added.search(tail):
            self.ends = [int(self.tokenizer.convert_tokens_to_ids(end[0]))]  # type: ignore[arg-type]
        self.tails, next_question = {tail}, _between(whole, a, q)
        if next_question and not next_question.startswith(tail):
            header = common_suffix(next_question, short[: short.index(q)])
            tokens = list(added.finditer(next_question))
            if tokens and (tokens[0].end() <= len(next_question) - header or len(tokens) > 1):
                self.tails.add(next_question[: tokens[0].end()])
        self.closing = {token for text in self.tails for token in added.findall(text)}
        if opened != prompt and opened.startswith(prompt):
            self.opening = opened[len(prompt) :]
            self.before = [self.opening] if self.opening in middle else [middle]
        elif short.startswith(prompt) and (rest := short[len(prompt) : short.index(a)]).strip():
            self.header, self.before = rest, [rest]
        elif middle.strip():
            self.before = [middle.rstrip()]

    @cached_property
    def words(self) -> set[str]:
        """Names and texts in the template's program: what it can read of a turn."""
        from jinja2 import Environment, nodes

        template: Any = self.tokenizer.chat_template
        sources = template.values() if isinstance(template, dict) else [template]
        words: set[str] = set()
        for source in sources:
            program = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
            words |= {str(node.value) for node in program.find_all(nodes.Const)}
            words |= {node.attr for node in program.find_all(nodes.Getattr)}
            words |= {node.name for node in program.find_all(nodes.Name)}
        return words

    def marks(self, given: Conversation, whole: str) -> list[tuple[int, int]]:
        """The characters of the whole between its `{% generation %}` marks; none if it has no marks."""
        template = self.tokenizer.get_chat_template(tools=given.tools)
        if not _GENERATION.search(template):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        names = {**self.tokenizer.special_tokens_map, **given.variables}
        rendered: Any = render_jinja_template(
            [given.turns], tools=given.tools, chat_template=template, return_assistant_tokens_mask=True, **names
        )
        texts, marks = rendered
        return [(a, b) for a, b in marks[0] if b > a] if texts[0] == whole else []

    def left_out(self, given: Conversation, whole: str, open: bool = False) -> list[str]:
        """Notices of keys, tools and turns that the template does not write. Raises BadRow: it cannot do without."""
        notices = []
        keys = {key for turn in given.turns for key in turn} - {"role", "content"}
        for key in sorted(keys):
            if key in self.words or (key in REASONING and self.words.intersection(REASONING)):
                continue
            without = [{k: v for k, v in turn.items() if k != key} for turn in given.turns]
            if self.attempt(given, without, open) != whole:
                continue
            if key not in MINOR:
                raise BadRow(_unread(key))
            notices.append(f"{key} of a turn is left out: the chat template does not write it")
        if given.tools and self.attempt(replace(given, tools=None), given.turns, open) == whole:
            notices.append("tools are left out: the chat template does not write them")
        for name in given.variables:
            if name not in self.words:
                notices.append(f"{name} is left out: the chat template has no such variable")
        for i, turn in enumerate(given.turns):
            if turn["role"] == "assistant" or not text_of(turn).strip():
                continue
            if turn["role"] == "user" and text_of(turn).strip() in whole:
                continue
            marked = [*given.turns[:i], next(with_mark(turn)), *given.turns[i + 1 :]]
            if MARK not in (self.attempt(given, marked, open) or MARK):
                notices.append(f"the {turn['role']} turn is left out: the chat template does not write it")
        return notices


def _unread(key: str) -> str:
    return f"has the key {key!r} in a turn, which the chat template does not read"


def _between(text: str, first: str, second: str) -> str:
    """What stands between two texts, where they follow each other; else nothing."""
    return text.partition(first)[2].partition(second)[0] if second in text.partition(first)[2] else ""


def common_suffix(a: str, b: str) -> int:
    """How many characters two texts have in common at their ends."""
    pairs = zip(reversed(a), reversed(b))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _reserved() -> set[str]:
    from transformers import PreTrainedTokenizerBase

    return {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents", "kwargs"}
