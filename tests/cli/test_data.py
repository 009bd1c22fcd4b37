"""``data preview``: rows as the model reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.text import Span

from talklora_pl.cli import main
from talklora_pl.cli.preview import marked, pieces
from tests.data.tiny import save_model, tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "ä a"}]
    rows = [{"messages": [*turns, {"role": "user", "content": "v"}, {"role": "assistant", "content": "b"}]}] * 3
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"question": "q?", "choices": ["x", "yes"], "label": 1}
    (tmp_path / "choice.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def preview(*argv: str) -> int:
    return main(["data", "preview", "--config", "method/talklora", "--model.base.path", "base", *argv])


def test_preview_marks_what_is_learned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview("--data.train", "chat.jsonl", "--data.rows", "chat", "--data.val_size", "0", "--limit", "2") == 0
    said = capsys.readouterr().out
    assert said.count("<s>[user]u\n[assistant][[ä a</s>]]\n[user]v\n[assistant][[b</s>]]\n") == 2
    assert "data.train: chat-0: 47 tokens, 6 learned" in said and "3 rows, 18 of 141 tokens learned" in said
    assert sorted(path.name for path in folder.iterdir()) == ["base", "cache", "chat.jsonl", "choice.jsonl"]


def test_preview_of_choices_and_of_the_last_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview("--data.train", "choice.jsonl", "--data.rows", "choice", "--data.val_size=0") == 0
    said = capsys.readouterr().out
    assert "choice 0, wrong" in said and "Answer: x</s>" in said and "Answer:[[ yes</s>]]" in said
    assert (
        preview("--data.train", "chat.jsonl", "--data.format", "chat", "--data.val_size=0", "--data.train_on=last") == 0
    )
    assert "[assistant]ä a</s>\n[user]v\n[assistant][[b</s>]]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--limit", "many"], "--limit: 'many' is no number"),
        (["--data.train", "nope.jsonl"], "nope.jsonl: there is no such file"),
        (["--data.trian", "x"], "no option 'data.trian'"),
        ([], "data.train: there is nothing to fit"),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert preview(*argv) == 2
    assert message in capsys.readouterr().err


def test_only_preview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "view"]) == 2
    with pytest.raises(SystemExit):
        main(["data", "preview", "--help"])
    assert "usage: python -m talklora_pl data preview" in capsys.readouterr().out


def test_colours_on_a_terminal() -> None:
    tok = tokenizer()
    ids = [256, *tok("ab", add_special_tokens=False).input_ids, 257]
    text = marked(tok, ids, [-100, -100, *ids[2:]], terminal=True)
    assert text.plain == "<s>ab</s>" and Span(4, 9, "bold green") in text.spans and Span(0, 3, "reverse") in text.spans
    assert list(pieces(tok, ids, [])) == [("<s>ab</s>", False)]
