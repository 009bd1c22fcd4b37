"""What a run writes fits a window of 80 columns, and no line lands in a progress bar."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities import rank_zero_warn
from rich.cells import cell_len

from talklora_pl.callbacks.progress import EpochProgress
from talklora_pl.cli import lightning as command_line
from talklora_pl.cli import main
from talklora_pl.runs import new_run
from tests.data.tiny import save_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_warnings_of_lightning_are_one_line_without_its_source() -> None:
    before = warnings.formatwarning
    with warnings.catch_warnings(record=True) as said:
        command_line.quiet()
        shown = warnings.formatwarning
        for text in ("Checkpoint directory runs/a exists and is not empty.", "The number of training batches"):
            rank_zero_warn(text, category=PossibleUserWarning)
    warnings.formatwarning = before
    (line,) = [shown(w.message, w.category, w.filename, w.lineno) for w in said]  # a resumed run's folder is no news
    assert line == "warning: The number of training batches\n"


def test_a_line_goes_where_stderr_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = command_line._AboveTheBar()
    text = "Adapter of the best checkpoint: /a/folder/with/a/name/that/is/longer/than/the/window at last\nsecond"
    record = logging.LogRecord("a", logging.INFO, "", 0, text, None, None)
    monkeypatch.setenv("COLUMNS", "40")
    for kind, lines in (
        (io.StringIO, text.split("\n")),
        (Terminal, ["Adapter of the best checkpoint:", f"  {text.split()[5]}", "  at last", "second"]),
    ):
        monkeypatch.setattr(sys, "stderr", kind())
        handler.emit(record)
        assert sys.stderr.getvalue().splitlines() == lines


@pytest.mark.parametrize("columns, bar, parts", [(80, 10, 4), (200, 40, 5)])
def test_the_bar_leaves_room_for_metrics(columns: int, bar: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    made = EpochProgress().configure_columns(L.Trainer(logger=False, accelerator="cpu"))
    assert (len(made), made[1].bar_width) == (parts, bar)


def test_the_table_of_runs_keeps_names_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = {
        "method": "talklora_attention",
        "data": "/data/of/mine/commonsense_qa.jsonl",
        "seed": 42,
        "state": "running",
    }
    scores = {"val_accuracy": 0.25, "val_loss": 1.5}
    for name in ("version_0", "a-name-of-some-length"):
        run = new_run(tmp_path, name)
        run.write(**told, step=1200, scores=scores)
    assert main(["runs", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[1:])) <= 80
    for words in (
        "a-name-of-some-length",
        "talklora_attention",
        "commonsense_qa.jsonl",
        "val_accuracy 0.25",
        "step 1200",
    ):
        assert Path(words).name in shown


@pytest.mark.slow
def test_the_quickstart_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = str(Path(__file__).parents[2])
    changes = {"PYTHONPATH": root, "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "80", "TERM": "xterm"}
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    model = save_model(tmp_path / "model", max_position_embeddings=256)
    options = ["--model.base.path", model.path, "--data.max_length", "128", "--trainer.max_steps", "2"]
    written = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 4096)
        written.extend(data)
        return data

    command = [sys.executable, "-m", "talklora_pl", "quickstart", *options, "--trainer.accelerator", "cpu"]
    assert pty.spawn(command, read) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
    assert [line for line in lines if cell_len(line) > 80 and str(tmp_path) not in line] == []
    assert [line for line in lines if re.search("FLOPs|v_num|[Ww]arning|it/s", line)] == []
    order = [
        "small skills",
        "Trained: ",
        "Epoch 0 ",
        "Adapter: ",
        "Test scores",
        "One question of each",
        "Which experts",
    ]
    places = [next(i for i, line in enumerate(lines) if words in line) for words in [*order, "What to type next"]]
    assert places == sorted(places)
    assert b"\x1b[2K" in written.rpartition(b"Testing")[2]  # the bar is wiped out at its end
