"""A conversation as tokens: where the answers are in what the chat template writes, and which tokens are learned.

The conversation is rendered once as a whole. Where an answer begins and ends in it comes from the template's
`{% generation %}` marks; else from what the template writes for the turns before it, where that is the beginning of the
whole; else from the place of the answer's own text. Templates treat turns by what follows them (Qwen3 writes thoughts
in the newest turns only, Mistral moves the system text), so a turn rendered by itself says nothing.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, Literal

from talklora_pl.data.encode import Encoder, alternatives
from talklora_pl.data.source import BadRow
from talklora_pl.data.template import Template, common_suffix
from talklora_pl.data.turns import (
    LEARN,
    MARK,
    REASONING,
    Conversation,
    Turn,
    is_learned,
    json_arguments,
    text_of,
    with_mark,
)
from talklora_pl.inputs import NO_LOSS


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
        self.template = Template(encoder)
        self.ends = self.template.ends
        self._frames: dict[tuple[str, ...], Frame] = {}

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
            given, whole = self.template.write(conversation, open=True)
            notices = [*self.template.left_out(given, whole, open=True), *self.encoder.notices(whole)]
            start = len(whole) - len(self.template.opening + self.template.header)
            (ids, (marker,)) = self.encoder.spans(whole, [(start, len(whole))])
            return Written(ids, [NO_LOSS] * len(ids), len(ids), len(ids) - marker[0], notices)
        given, whole = self.template.write(conversation)
        frame = self._frame(conversation, given, whole)
        notices = [*([] if frame else self.template.left_out(given, whole)), *self.encoder.notices(whole)]
        if any(json.dumps(text, ensure_ascii=False) in whole for turn in given.turns for text in json_arguments(turn)):
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
        learned = [i for i in answers if is_learned(turns[i]) and (self.train_on == "all" or i == last)]
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
        template = self.template
        usual = (template.opening + template.header, *template.before)
        opening = next((text for text in usual if text and before.endswith(text)), "")
        asked = None
        if template.opening and opening != usual[0]:
            asked = template.attempt(given, given.turns[:i], open=True)
        if asked is None or before == asked:
            return opening, ""
        shut = template.attempt(given, given.turns[:i]) or ""
        return opening, asked[len(shut) :] if asked.startswith(shut) else template.opening

    def _frame(self, conversation: Conversation, given: Conversation, whole: str) -> Frame | None:
        """What stands around the texts of plain turns, if the template has written these as others of the same roles.

        Finding the answers takes several renderings. In turns of a role and a text alone, in which nothing stands that
        the template may look for, they are where they were in the conversation before.
        """
        texts: list[Any] = [turn.get("content") for turn in given.turns]
        plain = all(turn.keys() == {"role", "content"} for turn in conversation.turns)
        if not plain or given.tools is not None or given.variables:
            return None
        if any(not isinstance(text, str) or not text or text != text.strip() for text in texts):
            return None
        if any(self._sought.search(text) for text in texts):
            return None
        roles = tuple(turn["role"] for turn in given.turns)
        if roles not in self._frames:
            marks = [MARK + str(i) + MARK for i in range(len(roles))]
            turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
            parts = re.split(f"{MARK}([0-9]+){MARK}", self.template.attempt(given, turns) or "")
            whole_frame = parts[1::2] == [str(i) for i in range(len(roles))]
            self._frames[roles] = Frame(parts[::2] if whole_frame else [])
        frame = self._frames[roles]
        return frame if frame.texts and frame.around(texts) == whole else None

    @cached_property
    def _sought(self) -> re.Pattern[str]:
        """What a template may look for in a text: tokens, and texts of its program with a bracket or bar in them."""
        words = (word for word in self.template.words if re.search(r"[][<>{}|]", word))
        return alternatives({*self.encoder.added, *words})

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
        opened = self.template.attempt(given, given.turns[:i], open=True)
        closed = whole if last else self.template.attempt(given, given.turns[: i + 1])
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
        control = alternatives({*self.encoder.special, *self.template.closing})
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
        token = alternatives(self.template.closing).search(whole, after)
        if token and (turn.get("tool_calls") or not whole[after : token.start()].strip()):
            return Located(start, after, token.end(), True)
        return Located(start, after, after, False)

    def _start(self, given: Conversation, whole: str, i: int, at: int, text_end: int) -> int | None:
        """Where an answer begins whose text ends there, if what comes before it is not what a server would write."""
        if i:  # what a server would write after the turn before it, at least
            for marked in with_mark(given.turns[i - 1]):
                turns = [*given.turns[: i - 1], marked]
                rest = (self.template.attempt(given, turns, open=True) or "").partition(MARK)[2]
                after = (self.template.attempt(given, [*turns, *given.turns[i:]]) or "").partition(MARK)[2]
                start = len(whole) - len(after) + len(rest)
                if rest and after.startswith(rest) and whole.endswith(after) and at <= start <= text_end:
                    return start
        text = text_of(given.turns[i])
        text_start = max(at, text_end - common_suffix(whole[:text_end], text.rstrip() or text))
        for key in self.template.before:  # it may share its last characters with what the text has before them
            if (j := whole.rfind(key, at, text_start + len(key) - 1)) >= 0:
                return j + len(key)
        if text_start == text_end:
            return None
        return text_start if self.template.opening or self.template.header else at + len(whole[at:text_start].rstrip())

    def _text_end(
        self, given: Conversation, whole: str, i: int, start: int | None, end: int | None, at: int
    ) -> int | None:
        """Where the last text of a turn ends in the whole."""
        turn, text = given.turns[i], text_of(given.turns[i])
        if start is not None and end is not None and not turn.get("tool_calls") and text.strip():
            for tail in self.template.tails:
                j = end - len(tail)
                if whole.endswith(tail, start, end) and whole.endswith(text.strip(), start, j):
                    return j
        for marked in with_mark(turn):
            written = self.template.attempt(given, [*given.turns[:i], marked, *given.turns[i + 1 :]])
            if written is None or MARK not in written:
                continue
            before, _, after = written.partition(MARK)
            least = max(at, start or 0, len(before) if whole.startswith(before) else 0)
            if whole.endswith(after) and len(whole) - len(after) >= least:
                return len(whole) - len(after)
        j = whole.find(text.strip(), max(at, start or 0)) if text.strip() else -1
        return j + len(text.strip()) if j >= 0 else None

    def _marked(
        self, given: Conversation, whole: str, found: dict[int, Located], learned: list[int]
    ) -> tuple[list[tuple[int, int]], list[str]]:
        """The characters to learn: by the template's marks if it has any, and notices."""
        marks = self.template.marks(given, whole)
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

    def _lost_text(self, given: Conversation, whole: str, found: dict[int, Located]) -> list[str]:
        """Notices of thoughts and parts of answers that the template cuts."""
        notices = []
        for i, place in found.items():
            start = max(0, place.start - len(self.template.opening))
            turn, written = given.turns[i], _squeeze(whole[start : place.end])
            if _squeeze(text_of(turn)) not in written:
                notices.append(
                    "a part of an answer is left out: the chat template does not write it (many cut the thoughts)"
                )
            thoughts = next((turn[key] for key in REASONING if isinstance(turn.get(key), str)), "")
            if _squeeze(thoughts) not in written and self.template.words.intersection(REASONING):
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
        found: dict[int, Located | None] = {}
        for i, (relative, closed) in self.answers.items():
            start, text_end, end = (starts[k] + distance for k, distance in relative)
            found[i] = Located(start, text_end, end, closed)
        return found or None


@dataclass
class Located:
    """Characters of an answer: its start, the end of its text, its end; whether the template closes it with a token."""

    start: int
    text_end: int
    end: int
    closed: bool


def _squeeze(text: str) -> str:
    return "".join(text.split())
