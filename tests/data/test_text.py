"""Texts alone: every token learned once, split and packed; completions without a prompt are the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from talklora_pl.base import BaseModel
from talklora_pl.data import Source, TextData
from talklora_pl.data.rows.text import pieces
from talklora_pl.data.source import BadRow
from talklora_pl.data.tokens import NO_LOSS, Tokenize
from talklora_pl.errors import UserError
from tests.data.tiny import tokenizer

Jsonl = Callable[..., str]
EOS = 257


def learned(labels: list[int]) -> list[int]:
    """What a causal model learns from labels that are not shifted."""
    return [label for label in labels[1:] if label != NO_LOSS]


def data(base: BaseModel, stage: str = "fit", **options: Any) -> TextData:
    module = TextData(base=base, **{"max_length": 20, "val_size": 0, **options})
    if stage == "fit":
        module.prepare_data()
    module.setup(stage)
    return module


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 10, 11, 30, 100])
def test_every_token_is_learned_once_and_after_the_one_before_it(bos: bool, length: int) -> None:
    tok = tokenizer(bos=bos)
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    ids = [*tok(text, add_special_tokens=False).input_ids, EOS]
    got = list(pieces(text, Tokenize(tok, 10)))
    rows = [(tokens.input_ids[0], tokens.labels[0]) for tokens in got]
    # without a BOS nothing comes before the first token, which therefore cannot be learned
    assert [t for _, labels in rows for t in learned(labels)] == (ids if bos else ids[1:])
    assert all(len(row) <= 10 and len(row) == len(labels) for row, labels in rows)
    assert all(row[:1] == [256] and row[1:].count(256) == 0 for row, _ in rows) if bos else True
    assert [t for row, _ in rows for t in row].count(EOS) == 1 and rows[-1][0][-1] == EOS
    for (before, _), (row, labels) in pairwise(rows):
        assert row[bos] == before[-1] and labels[bos] == NO_LOSS
    assert all(label in (token, NO_LOSS) for row, labels in rows for token, label in zip(row, labels))
    assert all(len(row) == 10 for row, _ in rows[:-1])


def test_a_text_that_says_its_own_bos_has_one() -> None:
    (tokens,) = pieces("<s>a</s>", Tokenize(tokenizer(), 10, special_tokens_in_data="control"))
    a = tokenizer(bos=False)("a").input_ids
    assert (tokens.input_ids, tokens.labels) == ([[256, *a, EOS]], [[NO_LOSS, *a, EOS]])
    (tokens,) = pieces("<s>a</s>", Tokenize(tokenizer(), 20))
    assert len(tokens.input_ids[0]) == 10  # BOS, the eight letters, EOS
    assert "<s>" in "".join(tokens.notices)


def test_no_room() -> None:
    with pytest.raises(BadRow, match=r"a sequence of 2 tokens .* no room"):
        list(pieces("text", Tokenize(tokenizer(), 2)))


def test_a_file_is_a_text_without_further_options(base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x" * 40)
    module = data(base, train=str(tmp_path / "corpus.txt"), batch_size=1)
    table = module.tables["train"]
    assert list(table["id"]) == ["corpus-0.0", "corpus-0.1", "corpus-0.2"]
    assert list(table["loss_tokens"]) == [len(learned(row)) for (row,) in table["labels"]] == [19, 18, 4]
    assert sum(batch["step_tokens"] for batch in module.train_dataloader()) == 41
    lines = data(base, train=[Source(str(tmp_path / "corpus.txt"), sample_by="line", limit=1)])
    assert len(lines.tables["train"]) == 3


@pytest.mark.parametrize(
    "rows, options",
    [
        ([{"text": "abc"}], {"rows": "text"}),
        ([{"body": "abc", "url": "u"}], {"rows": "text", "columns": {"text": "body"}}),
        ([{"text": "abc"}], {"columns": {"completion": "text"}}),
        ([{"completion": "abc"}], {}),
        ([{"completion": "abc", "prompt": None}], {}),
        ([{"completion": "abc", "prompt": "", "url": "u"}], {}),
    ],
)
def test_ways_to_say_a_text(base: BaseModel, rows: list[Any], options: dict[str, Any]) -> None:
    (row,) = data(base, train=rows, **options).tables["train"]
    tok = tokenizer()
    assert (tok.decode(row["input_ids"][0]), tok.decode(learned(row["labels"][0]))) == ("<s>abc</s>", "abc</s>")
    assert (row["prompt_length"], row["answers"], row["label"]) == (0, [], 0)


def test_a_prompt_may_be_absent_in_some_rows(base: BaseModel) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"completion": "d" * 30}]
    table = data(base, train=rows).tables["train"]
    assert (list(table["prompt_length"]), list(table["answers"])) == ([2, 0, 0], [["c"], [], []])
    with pytest.raises(UserError, match=r"row 1, column 'prompt': is missing, and 'question' may be it: .*rows: text"):
        data(base, train=[{"question": "?", "completion": "c"}])
    with pytest.raises(UserError, match="column 'prompt': is missing or empty, so there is nothing to continue"):
        data(base, "predict", predict=[{"prompt": ""}])


def test_packed_texts_are_joined_within_a_task(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("talklora_pl.data.report.rank_zero_info", said.append)
    texts = ["aaaa", "bbbb", "cccc", "d" * 30, "ee", "ff"]
    rows = [{"text": text, "task": "one" if text < "f" else "two"} for text in texts]
    table = data(base, train=rows, rows="text", documents="packed").tables["train"]
    tok = tokenizer()
    assert [tok.decode(row) for (row,) in table["input_ids"]] == [
        "<s>aaaa</s><s>bbbb</s><s>cccc</s>",
        "<s>" + "d" * 19,
        "<s>" + "d" * 12 + "</s><s>ee</s>",
        "<s>ff</s>",
    ]
    assert list(table["task"]) == ["one", "one", "one", "two"]
    assert list(table["loss_tokens"]) == [len(learned(row)) for (row,) in table["labels"]] == [15, 19, 15, 3]
    assert list(table["length"]) == [18, 20, 18, 4]
    assert said[0] == "data.train: one, two: 4 rows from 6 texts"
    split = data(base, train=rows, rows="text").tables["train"]
    count = {tuple(t for (row,) in x["labels"] for t in learned(row)) for x in (table, split)}
    assert len(count) == 1  # the same tokens, each once


def test_packing_is_for_texts_and_leaves_questions_alone(base: BaseModel) -> None:
    asked = [{"prompt": "p", "completion": "c"}] * 3
    with pytest.raises(UserError, match=r"data.documents: packed is for texts alone"):
        data(base, train=asked, documents="packed")
    mixed = data(base, train=[Source(asked), Source([{"text": "a"}] * 3, rows="text")], documents="packed")
    assert list(mixed.tables["train"]["length"]) == [4, 4, 4, 9]


def test_a_text_to_predict_for_is_continued(base: BaseModel) -> None:
    module = data(base, "predict", predict=[{"text": "abc"}], rows="text")
    (batch,) = module.predict_dataloader()
    assert tokenizer().decode(batch["input_ids"][0]) == "<s>abc" and batch["prompt_length"].tolist() == [4]
    assert batch["labels"].eq(NO_LOSS).all() and batch["answer"].tolist() == [-1]


def test_a_format_that_writes_more_than_the_text() -> None:
    from talklora_pl.data.rows import check_format, row_kind

    check_format("plain", row_kind("text"))
    for name in ("chat", "alpaca", "Q: {prompt}"):
        with pytest.raises(UserError, match="text rows are read as they are; leave the format out"):
            check_format(name, row_kind("text"))


def test_texts_are_measured_by_their_loss_and_not_generated(base: BaseModel) -> None:
    from talklora_pl.base import load_base
    from talklora_pl.evaluation import score_answers

    module = data(base, "test", test=[{"text": "abc"}, {"text": "d" * 30}], rows="text")
    (batch,) = module.test_dataloader()

    def never(prompts: Any) -> Any:
        raise AssertionError("a text was generated")

    never.any_rank = None  # type: ignore[attr-defined]
    scores = score_answers(load_base(base), batch, never)  # type: ignore[arg-type]
    assert sorted(scores.tokens_Q.tolist()) == [4, 12, 19]
    assert not scores.generated_Q.any() and not scores.ranked_Q.any()
