"""A conversation as the tokenizer's chat template writes it, and which of its tokens are learned.

The conversation is rendered once as a whole. Where an answer begins and ends in it comes from the template's
`{% generation %}` marks; else from what the template writes for the turns before it, where that is the beginning of the
whole; else from the place of the answer's own text. Templates treat turns by what follows them (Qwen3 writes thoughts
in the newest turns only, Mistral moves the system text), so a turn rendered by itself says nothing.
"""

from __future__ import annotations

import inspect
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, Literal

from talklora_pl.data.encode import END, Encoder, alternatives
from talklora_pl.data.source import BadRow
from talklora_pl.inputs import NO_LOSS

Turn = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
# keys of a turn that may be left out where the template does not write them, if that is said
MINOR = (*REASONING, "name", "id", "tool_call_id")
LEARN = ("weight", "train", "loss")  # whether to learn a turn, by different names
_MARK = chr(END)  # stands where a text ends; data do not hold it
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


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


@dataclass
class Written:
    """A conversation as tokens.

    Attributes:
        ids: what the template writes; then the end-of-sequence token, if the template ends the last answer in no way.
        labels: of the same length, -100 where there is no loss (not shifted).
        start: tokens before the last answer: what generation starts from.
        marker: how many of them, at their end, are the template's opening of an answer.
        notices: what was left out or replaced, one sentence each.
    """

    ids: list[int]
    labels: list[int]
    start: int
    marker: int
    notices: list[str]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        encoder: of that tokenizer.
        eos: the token that ends an answer where the template writes none.
        train_on: learn `all` answers of a conversation, or the `last`.

    Attributes:
        ends: the token with which the template ends a last answer: generation stops there. Empty if it has none.
    """

    def __init__(self, encoder: Encoder, eos: int, train_on: Literal["all", "last"] = "all") -> None:
        self.encoder, self.tokenizer, self.eos, self.train_on = encoder, encoder.tokenizer, eos, train_on
        self.ends: list[int] = []
        self._opening = ""  # what add_generation_prompt adds
        self._header = ""  # what stands before an answer all the same, where that adds nothing
        self._before: list[str] = []  # texts that end where an answer begins
        self._tails: set[str] = set()  # texts after a last answer, and after an earlier one
        self._closing: set[str] = set()  # tokens in them
        self._takes_text = self._takes_parts = True
        self._frames: dict[tuple[str, ...], Frame] = {}
        self._probe()

    def __call__(self, conversation: Conversation, open: bool | None = None) -> Written:
        """The tokens of a conversation, and what is learned of it.

        Args:
            conversation: as the data have it.
            open: ask for an answer after the last turn; None: if that is not the assistant's.

        Raises:
            BadRow: the template refuses it or does not write all of it, an answer cannot be found in what it writes,
                or there is nothing to learn.
        """
        turns = conversation.turns
        if turns[-1]["role"] != "assistant" if open is None else open:
            given, whole = self._write(conversation, open=True)
            notices = [*self._left_out(given, whole, open=True), *self.encoder.notices(whole)]
            (ids, (marker,)) = self.encoder.spans(whole, [(len(whole) - len(self._opening + self._header), len(whole))])
            return Written(ids, [NO_LOSS] * len(ids), len(ids), len(ids) - marker[0], notices)
        given, whole = self._write(conversation)
        frame = self._frame(conversation, given, whole)
        notices = [*([] if frame else self._left_out(given, whole)), *self.encoder.notices(whole)]
        if any(json.dumps(text, ensure_ascii=False) in whole for turn in given.turns for text in _json_arguments(turn)):
            notices.append(
                "arguments of a call are JSON as text, which the chat template writes in quotes once more; "
                "most servers give it an object"
            )
        for key in LEARN:
            if any(turn.get(key) and turn["role"] != "assistant" for turn in turns):
                notices.append(f"{key} has no effect on turns of others: the assistant's alone are learned")
        answers = frame.places(given.turns) if frame else None
        if answers is None:
            answers = self._find(given, whole)
            if frame:
                frame.keep(given.turns, answers)
        last = max(answers)
        if answers[last] is None:
            raise BadRow("the last answer cannot be found in what the chat template writes")
        learned = [i for i in answers if _weight(turns[i]) and (self.train_on == "all" or i == last)]
        if lost := [i for i in learned if answers[i] is None]:
            raise BadRow(f"the answer in turn {lost[0] + 1} cannot be found in what the chat template writes")
        if not learned:
            raise BadRow("no answer in it is to be learned (weight: 0 or train: false)")
        found = {i: place for i, place in answers.items() if place is not None}
        notices += self._lost_text(given, whole, found)
        spans, more = self._marked(given, whole, found, learned)
        notices += more
        start = found[last].start
        opening, missing = self._opening_before(given, whole[:start], last)
        if missing:
            notices.append(
                f"asked for an answer, the chat template writes {missing!r}, which it does not write before the "
                "answers of these rows"
            )
        ids, (first, marker, *tokens) = self.encoder.spans(
            whole, [(start, len(whole)), (start - len(opening), start), *spans]
        )
        labels = [NO_LOSS] * len(ids)
        for a, b in tokens:
            labels[a:b] = ids[a:b]
        if last == len(turns) - 1 and not found[last].closed:
            name = self.tokenizer.convert_ids_to_tokens(self.eos)
            notices.append(f"ends with {name!r}, since the chat template writes no token after a last answer")
            labels = [*labels, self.eos if last in learned else NO_LOSS]
            if last in learned:  # with what the template writes after it
                labels[first[0] : len(ids)] = ids[first[0] :]
            ids = [*ids, self.eos]
        return Written(ids, labels, first[0], first[0] - min(marker[0], first[0]), notices)

    def _opening_before(self, given: Conversation, before: str, i: int) -> tuple[str, str]:
        """The opening of answer `i` that stands before it, and one that a server would write there but does not."""
        usual = (self._opening + self._header, *self._before)
        opening = next((text for text in usual if text and before.endswith(text)), "")
        asked = self._try(given, given.turns[:i], open=True) if self._opening and opening != usual[0] else None
        if asked is None or before == asked:
            return opening, ""
        shut = self._try(given, given.turns[:i]) or ""
        return opening, asked[len(shut) :] if asked.startswith(shut) else self._opening

    # - rendering ------------------------------------------------------------------------------------------------------

    def _write(self, conversation: Conversation, open: bool = False) -> tuple[Conversation, str]:
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
            for change in (_other_arguments, _with_content, lambda turn: _with_content(_other_arguments(turn))):
                other = replace(given, turns=[change(turn) for turn in turns])
                if other.turns != turns and (text := self._try(other, other.turns, open)) is not None:
                    return other, text
            unread = {key for turn in turns for key in turn if key not in ("role", "content", *MINOR)} - self._words
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
        return text + self._header if open else text

    def _try(self, given: Conversation, turns: list[Turn], open: bool = False) -> str | None:
        try:
            return self._render(replace(given, turns=turns), open) if turns else None
        except BadRow:
            return None

    # - what the template does with plain turns ------------------------------------------------------------------------

    def _probe(self) -> None:
        """How it opens and closes an answer, seen in a conversation of two questions and two answers."""
        q, a = _MARK + "q", _MARK + "a"
        turns: list[Turn] = [{"role": role, "content": text} for role, text in (("user", q), ("assistant", a))] * 2
        parts: list[Turn] = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        empty = Conversation([])
        by_text, by_parts = self._try(empty, turns[:2]), self._try(empty, parts[:2])
        if a not in (by_text or ""):
            self._takes_text, turns = a not in (by_parts or ""), parts
        self._takes_parts = by_parts is not None and (by_parts == by_text or not self._takes_text)
        whole, short, prompt = (self._try(empty, turns[:n]) or "" for n in (4, 2, 1))
        opened = self._try(empty, turns[:1], open=True) or ""
        if not all(text in short for text in (q, a)):
            return
        added = alternatives(self.encoder.added)
        middle, tail = _between(short, q, a), short[short.index(a) + len(a) :]
        if end := added.search(tail):
            self.ends = [int(self.tokenizer.convert_tokens_to_ids(end[0]))]  # type: ignore[arg-type]
        self._tails, next_question = {tail}, _between(whole, a, q)
        if next_question and not next_question.startswith(tail):
            header = _common_suffix(next_question, short[: short.index(q)])
            tokens = list(added.finditer(next_question))
            if tokens and (tokens[0].end() <= len(next_question) - header or len(tokens) > 1):
                self._tails.add(next_question[: tokens[0].end()])
        self._closing = {token for text in self._tails for token in added.findall(text)}
        if opened != prompt and opened.startswith(prompt):
            self._opening = opened[len(prompt) :]
            self._before = [self._opening] if self._opening in middle else [middle]
        elif short.startswith(prompt) and (rest := short[len(prompt) : short.index(a)]).strip():
            self._header, self._before = rest, [rest]
        elif middle.strip():
            self._before = [middle.rstrip()]

    @cached_property
    def _words(self) -> set[str]:
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

    def _frame(self, conversation: Conversation, given: Conversation, whole: str) -> Frame | None:
        """What stands around the texts of plain turns, if the template has written these as others of the same roles.

        Finding the answers takes several renderings. In turns of a role and a text alone, in which nothing stands that
        the template may look for, they are where they were in the conversation before.
        """
        texts = [turn.get("content") for turn in given.turns]
        plain = all(turn.keys() == {"role", "content"} for turn in conversation.turns)
        if not plain or given.tools is not None or given.variables:
            return None
        if any(not isinstance(text, str) or not text or text != text.strip() for text in texts):
            return None
        if any(self._sought.search(text) for text in texts):
            return None
        roles = tuple(turn["role"] for turn in given.turns)
        if roles not in self._frames:
            marks = [_MARK + str(i) + _MARK for i in range(len(roles))]
            turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
            parts = re.split(f"{_MARK}([0-9]+){_MARK}", self._try(given, turns) or "")
            whole_frame = parts[1::2] == [str(i) for i in range(len(roles))]
            self._frames[roles] = Frame(parts[::2] if whole_frame else [])
        frame = self._frames[roles]
        return frame if frame.texts and frame.around(texts) == whole else None

    @cached_property
    def _sought(self) -> re.Pattern[str]:
        """What a template may look for in a text: tokens, and texts of its program with a bracket or bar in them."""
        return alternatives({*self.encoder.added, *(word for word in self._words if re.search(r"[][<>{}|]", word))})

    # - the places of the answers --------------------------------------------------------------------------------------

    def _find(self, given: Conversation, whole: str) -> dict[int, Located | None]:
        """Turn of an answer -> where it is in the whole; None where it cannot be found."""
        places: dict[int, Located | None] = {}
        at = 0
        for i in [i for i, turn in enumerate(given.turns) if turn["role"] == "assistant"]:
            place = places[i] = self._place(given, whole, i, at)
            at = at if place is None else place.end
        return places

    def _place(self, given: Conversation, whole: str, i: int, at: int) -> Located | None:
        turn, last = given.turns[i], i == len(given.turns) - 1
        opened = self._try(given, given.turns[:i], open=True)
        closed = whole if last else self._try(given, given.turns[: i + 1])
        start = len(opened) if opened and whole.startswith(opened) else None
        end = len(closed) if closed and whole.startswith(closed) else None
        text_end = self._text_end(given, whole, i, start, end, at)
        if text_end is not None and start is not None and start > text_end:
            start = None
        if text_end is None and (start is None or end is None):
            return None
        if start is None:
            assert text_end is not None
            start = self._start(given, whole, i, at, text_end)
            if start is None:
                return None
        control = alternatives({*self.encoder.special, *self._closing})
        if text_end is None and not control.sub("", whole[start:end]).strip():
            return None
        after = start if text_end is None else text_end
        if end is not None:
            ends = [m.span() for m in control.finditer(whole, after, end)]
            if ends and not turn.get("tool_calls") and not whole[after : ends[0][0]].strip():
                return Located(start, after, ends[0][1], True)
            if ends and not whole[ends[-1][1] : end].strip():
                return Located(start, after, ends[-1][1], True)
            return Located(start, after, end, False)
        token = alternatives(self._closing).search(whole, after)
        if token and (turn.get("tool_calls") or not whole[after : token.start()].strip()):
            return Located(start, after, token.end(), True)
        return Located(start, after, after, False)

    def _start(self, given: Conversation, whole: str, i: int, at: int, text_end: int) -> int | None:
        """Where an answer begins whose text ends there, if what comes before it is not what a server would write."""
        if i:  # what a server would write after the turn before it, at least
            for marked in _with_mark(given.turns[i - 1]):
                asked = self._try(given, [*given.turns[: i - 1], marked], open=True) or ""
                rest = asked.partition(_MARK)[2]
                after = (self._try(given, [*given.turns[: i - 1], marked, *given.turns[i:]]) or "").partition(_MARK)[2]
                start = len(whole) - len(after) + len(rest)
                if rest and after.startswith(rest) and whole.endswith(after) and at <= start <= text_end:
                    return start
        text = _text(given.turns[i])
        text_start = max(at, text_end - _common_suffix(whole[:text_end], text.rstrip() or text))
        for key in self._before:  # it may share its last characters with what the text has before them
            if (j := whole.rfind(key, at, text_start + len(key) - 1)) >= 0:
                return j + len(key)
        if text_start == text_end:
            return None
        return text_start if self._opening or self._header else at + len(whole[at:text_start].rstrip())

    def _text_end(
        self, given: Conversation, whole: str, i: int, start: int | None, end: int | None, at: int
    ) -> int | None:
        """Where the last text of a turn ends in the whole."""
        turn, text = given.turns[i], _text(given.turns[i])
        if start is not None and end is not None and not turn.get("tool_calls") and text.strip():
            for tail in self._tails:
                j = end - len(tail)
                if whole.endswith(tail, start, end) and whole.endswith(text.strip(), start, j):
                    return j
        for marked in _with_mark(turn):
            written = self._try(given, [*given.turns[:i], marked, *given.turns[i + 1 :]])
            if written is None or _MARK not in written:
                continue
            before, _, after = written.partition(_MARK)
            least = max(at, start or 0, len(before) if whole.startswith(before) else 0)
            if whole.endswith(after) and len(whole) - len(after) >= least:
                return len(whole) - len(after)
        j = whole.find(text.strip(), max(at, start or 0)) if text.strip() else -1
        return j + len(text.strip()) if j >= 0 else None

    def _marked(
        self, given: Conversation, whole: str, found: dict[int, Located], learned: list[int]
    ) -> tuple[list[tuple[int, int]], list[str]]:
        """The characters to learn: by the template's marks if it has any, and notices."""
        marks = self._marks(given, whole)
        if not marks:
            return [(found[i].start, found[i].end) for i in learned], []
        spans, notices = [], []
        for i in learned:
            place = found[i]
            mine = [(a, b) for a, b in marks if a < max(place.end, place.start + 1) and b > place.start]
            if not mine:
                raise BadRow(f"the chat template does not mark the answer in turn {i + 1} with {{% generation %}}")
            a, b = mine[-1]
            if b < place.end and place.closed and whole[b : place.end].strip():
                notices.append(
                    "the chat template's {% generation %} marks leave out the end of an answer, learned all the same"
                )
                mine[-1] = (a, place.end)
            spans += mine
        return spans, notices

    def _marks(self, given: Conversation, whole: str) -> list[tuple[int, int]]:
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

    # - what the template does not write -------------------------------------------------------------------------------

    def _left_out(self, given: Conversation, whole: str, open: bool = False) -> list[str]:
        """Notices of keys, tools and turns that the template does not write. Raises BadRow: it cannot do without."""
        notices = []
        keys = {key for turn in given.turns for key in turn} - {"role", "content"}
        for key in sorted(keys):
            if key in self._words or (key in REASONING and self._words.intersection(REASONING)):
                continue
            without = [{k: v for k, v in turn.items() if k != key} for turn in given.turns]
            if self._try(given, without, open) != whole:
                continue
            if key not in MINOR:
                raise BadRow(_unread(key))
            notices.append(f"{key} of a turn is left out: the chat template does not write it")
        if given.tools and self._try(replace(given, tools=None), given.turns, open) == whole:
            notices.append("tools are left out: the chat template does not write them")
        for name in given.variables:
            if name not in self._words:
                notices.append(f"{name} is left out: the chat template has no such variable")
        for i, turn in enumerate(given.turns):
            if turn["role"] == "assistant" or not _text(turn).strip():
                continue
            if turn["role"] == "user" and _text(turn).strip() in whole:
                continue
            marked = [*given.turns[:i], next(_with_mark(turn)), *given.turns[i + 1 :]]
            if _MARK not in (self._try(given, marked, open) or _MARK):
                notices.append(f"the {turn['role']} turn is left out: the chat template does not write it")
        return notices

    def _lost_text(self, given: Conversation, whole: str, found: dict[int, Located]) -> list[str]:
        """Notices of thoughts and parts of answers that the template cuts."""
        notices = []
        for i, place in found.items():
            turn, written = given.turns[i], _squeeze(whole[max(0, place.start - len(self._opening)) : place.end])
            if _squeeze(_text(turn)) not in written:
                notices.append(
                    "a part of an answer is left out: the chat template does not write it (many cut the thoughts)"
                )
            thoughts = next((turn[key] for key in REASONING if isinstance(turn.get(key), str)), "")
            if _squeeze(thoughts) not in written and self._words.intersection(REASONING):
                notices.append("reasoning_content of an answer is left out: the chat template does not write it there")
        return notices


@dataclass
class Frame:
    """What a template writes before, between and after the texts of turns of certain roles.

    Attributes:
        texts: one more than there are turns; none where it does not write all turns, each once.
        answers: turn of an answer -> where it is, each place as the number of a text here and a distance into it;
            empty until some have been found.
    """

    texts: list[str]
    answers: dict[int, tuple[list[tuple[int, int]], bool]] = field(default_factory=dict)

    def around(self, contents: list[str]) -> str:
        """The conversation of these contents."""
        return "".join(chain.from_iterable(zip(self.texts, contents))) + self.texts[-1]

    def _starts(self, turns: list[Turn]) -> list[int]:
        lengths = (len(text) + len(turn["content"]) for text, turn in zip(self.texts, turns))
        return list(accumulate(lengths, initial=0))

    def keep(self, turns: list[Turn], found: dict[int, Located | None]) -> None:
        """Remember where answers were found, if all were, each from before its turn's text to after the end of it."""
        starts, kept = self._starts(turns), {}
        for i, place in found.items():
            if place is None:
                return
            at = [(bisect_right(starts, p) - 1, p) for p in (place.start, place.text_end, place.end)]
            relative = [(k, p - starts[k]) for k, p in at]
            sure = [k for k, _ in relative] == [i, i + 1, i + 1] and relative[1][1] == 0
            if not sure or any(distance > len(self.texts[k]) for k, distance in relative):
                return
            kept[i] = relative, place.closed
        self.answers = kept

    def places(self, turns: list[Turn]) -> dict[int, Located | None] | None:
        """Where the answers of these turns are; None: not known yet."""
        starts = self._starts(turns)
        return {
            i: Located(*(starts[k] + distance for k, distance in relative), closed)  # type: ignore[misc]
            for i, (relative, closed) in self.answers.items()
        } or None


@dataclass
class Located:
    """Characters of an answer: its start, the end of its text, its end; whether the template closes it with a token."""

    start: int
    text_end: int
    end: int
    closed: bool


def _weight(turn: Turn) -> bool:
    """Whether a turn is to be learned, if it is an answer. Raises BadRow: by half."""
    for key in LEARN:
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            raise BadRow(f"has {key}: {value!r} in a turn; an answer is learned (1) or not (0)")
        if value is not None and not value:
            return False
    return True


def _text(turn: Turn) -> str:
    """The text of a turn's content."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else (_part_text(content[-1]) if content else "")


def _part_text(part: Any) -> str:
    return part if isinstance(part, str) else part["text"]


def _with_mark(turn: Turn) -> Iterator[Turn]:
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
        return value.rstrip() + _MARK, True
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in reversed([key for key in keys if key != "type"]):
        new, done = _mark_last(value[key])
        if done:
            out = dict(value) if isinstance(value, dict) else list(value)
            out[key] = new
            return out, True
    return value, False


def _unread(key: str) -> str:
    return f"has the key {key!r} in a turn, which the chat template does not read"


def _with_content(turn: Turn) -> Turn:
    return turn if "content" in turn else {**turn, "content": ""}


def _other_arguments(turn: Turn) -> Turn:
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


def _json_arguments(turn: Turn) -> list[str]:
    """The arguments of calls that are JSON as text."""
    functions = [call.get("function", call) for call in turn.get("tool_calls") or []]
    return [text for function in functions if isinstance(text := function.get("arguments"), str)]


def _between(text: str, first: str, second: str) -> str:
    """What stands between two texts, where they follow each other; else nothing."""
    return text.partition(first)[2].partition(second)[0] if second in text.partition(first)[2] else ""


def _common_suffix(a: str, b: str) -> int:
    pairs = zip(reversed(a), reversed(b))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _reserved() -> set[str]:
    from transformers import PreTrainedTokenizerBase

    return {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents", "kwargs"}
