"""What is trained on is what the chat template writes: ids, learned answers, and what is said where it drops a part."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from talklora_pl.data.chat import NO_LOSS, ChatTemplate, Conversation, Written
from talklora_pl.data.encode import Encoder
from talklora_pl.data.source import BadRow
from tests.data.templates import FAMILIES, Family, tokenizer

U, A, S = (
    (lambda text, role=role, **more: {"role": role, "content": text, **more})
    for role in ("user", "assistant", "system")
)
ONE = [U("hi"), A("hello")]
THREE = [U("hi"), A("hello"), U("1 and 2?"), A("3"), U("hi"), A(" e, hello\n3 ")]


def chat(
    family: str | Family, train_on: Any = "all", mode: Any = "text"
) -> tuple[PreTrainedTokenizerFast, ChatTemplate]:
    tok = tokenizer(FAMILIES[family] if isinstance(family, str) else family)
    return tok, ChatTemplate(Encoder(tok, mode), tok.eos_token_id, train_on)


def runs(tok: PreTrainedTokenizerFast, row: Written) -> list[str]:
    """The texts learned, one for each run of labels."""
    out: list[list[int]] = []
    for i, label in enumerate(row.labels):
        if label != NO_LOSS:
            assert label == row.ids[i]
            if i == 0 or row.labels[i - 1] == NO_LOSS:
                out.append([])
            out[-1].append(label)
    return [tok.decode(ids) for ids in out]


def of_template(tok: PreTrainedTokenizerFast, turns: list[dict[str, Any]], **more: Any) -> list[int]:
    return tok.apply_chat_template(turns, tokenize=True, return_dict=False, **more)


def as_parts(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def expected(family: Family, answers: list[str]) -> list[str]:
    """What is learned of answers, with white space at the ends of a text aside: many templates strip it."""
    patterns = [family.earlier or family.learned] * (len(answers) - 1) + [family.learned]
    return [
        "".join(p.replace("A", a, 1).split()) if "A" not in family.tokens else "" for p, a in zip(patterns, answers)
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "turns", [ONE, THREE, [S("Be brief."), *ONE], [S("Be brief."), *THREE]], ids=["1", "3", "s1", "s3"]
)
def test_families(name: str, turns: list[dict[str, Any]]) -> None:
    family = FAMILIES[name]
    tok, write = chat(family)
    if turns[0]["role"] == "system" and not family.system:
        pytest.skip("its template takes no system turn")
    row = write(Conversation(turns))
    shown = as_parts(turns) if name == "parts_only" else turns
    ids = of_template(tok, shown)
    ends_itself = name not in ("falcon", "glm4")
    assert row.ids == (ids if ends_itself else [*ids, tok.eos_token_id])
    assert len(row.labels) == len(row.ids)
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    want = expected(family, answers)
    assert ["".join(text.split()) for text in runs(tok, row)] == want
    assert [text for text in row.notices if "left out" in text] == []
    last = chat(family, "last")[1](Conversation(turns))
    assert last.ids == row.ids and ["".join(text.split()) for text in runs(tok, last)] == want[-1:]
    # generation starts from what a server sends
    if name not in ("r1", "qwq", "header_always"):
        assert row.ids[: row.start] == of_template(tok, shown[:-1], add_generation_prompt=True)
    assert [label for label in row.labels[: row.start] if label != NO_LOSS] == [
        i for i, label in zip(row.ids[: row.start], row.labels[: row.start]) if label != NO_LOSS
    ]
    asked = write(Conversation(turns[:-1]))
    assert set(asked.labels) == {NO_LOSS} and asked.start == len(asked.ids)
    if name not in ("r1", "qwq"):
        assert asked.ids == row.ids[: row.start]


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_where_the_template_ends_an_answer(name: str) -> None:
    tok, write = chat(name)
    row = write(Conversation(ONE))
    ends = write.ends or [tok.eos_token_id]
    assert sum(row.ids[row.start :].count(end) for end in ends) == 1
