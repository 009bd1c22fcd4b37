"""Rows of `preference`: texts and turns, and what is wrong with others."""

from __future__ import annotations

from typing import Any

import pytest

from talklora_pl.data.rows import RowReader
from talklora_pl.data.source import BadRow, Source
from talklora_pl.data.tokens import Tokenize
from talklora_pl.inputs import NO_LOSS
from tests.data.tiny import tokenizer

USER, MORE = {"role": "user", "content": "hi"}, {"role": "user", "content": "and?"}
GOOD, BAD, OLD = ({"role": "assistant", "content": text} for text in ("yes", "never", "old"))


def learned(row: dict[str, Any], format: str, require_answers: bool = True) -> list[tuple[str, str]]:
    """Text and learned text of each sequence."""
    read = RowReader(Source("x", rows="preference"), require_answers)
    tok = tokenizer()
    tokens = read.kind.tokens(read(row), format, Tokenize(tok, 200))
    pairs = zip(tokens.input_ids, tokens.labels)
    return [(tok.decode(ids), tok.decode([t for t in labels if t != NO_LOSS])) for ids, labels in pairs]


def test_texts() -> None:
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5!"}
    assert learned(row, "plain") == [("<s>2+2=4</s>", "4</s>"), ("<s>2+2=5!</s>", "5!</s>")]
    written = "<s>[user]2+2=\n[assistant]"
    assert [text for text, _ in learned(row, "chat")] == [f"{written}4</s>\n", f"{written}5!</s>\n"]
    assert learned({"prompt": "2+2="}, "plain", require_answers=False) == [("<s>2+2=", "")]


CONVERSATION = "<s>[user]hi\n[assistant]old</s>\n[user]and?\n[assistant]"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER, OLD, MORE], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, OLD, MORE, GOOD], "rejected": [USER, OLD, MORE, BAD]},
        {"prompt": [USER, OLD, MORE], "chosen": [USER, OLD, MORE, GOOD], "rejected": [USER, OLD, MORE, BAD]},
        {"prompt": "hi", "chosen": [USER, OLD, MORE, GOOD], "rejected": [USER, OLD, MORE, BAD]},
    ],
)
def test_turns(row: dict[str, Any]) -> None:
    """An answer in the prompt is not learned."""
    assert learned(row, "chat") == [
        (f"{CONVERSATION}yes</s>\n", "yes</s>"),
        (f"{CONVERSATION}never</s>\n", "never</s>"),
    ]


def test_a_prompt_as_text_before_answers_as_turns() -> None:
    row = {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}
    assert learned(row, "chat")[0] == ("<s>[user]hi\n[assistant]yes</s>\n", "yes</s>")
    assert learned({"prompt": [USER]}, "chat", require_answers=False) == [("<s>[user]hi\n[assistant]", "")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected': is missing"),
        ({"chosen": "b", "rejected": "c"}, "'prompt': is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'rejected': is the same text as chosen"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": "b"}, "'rejected': must be a list"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "begin with no common turn"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, "does not begin with the turns of the prompt"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [USER, BAD]}, "must be an answer"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "same turns as chosen"),
    ],
)
def test_what_is_no_pair(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        learned(row, "chat")


def test_turns_need_a_template() -> None:
    with pytest.raises(BadRow, match="say format: chat"):
        learned({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "plain")
