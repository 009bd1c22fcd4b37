"""A stream of two processes: each its own rows, steps over all of both, gone on with exactly and by two alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.runs import Run, fit
from tests.distributed.test_resume import interrupt, same_runs

STREAM = ("--data.streaming", "true", "--data.shuffle_buffer", "8", "--data.val_size", "0", "--data.batch_size", "2")
STREAM = (
    *STREAM,
    "--trainer.max_steps",
    "6",
    "--trainer.val_check_interval",
    "3",
    "--model.adapter.dropout_input",
    "0",
)
SELDOM = ("--trainer.log_every_n_steps", "2")
COUNT = ("--trainer.callbacks+=tests.distributed.faults.Collectives", "--trainer.callbacks.folder")
PLUGIN = """
import json, os
import lightning as L

class Seen(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        learned = int((batch["labels"][:, 1:] >= 0).sum())
        with open(os.environ["SEEN"] + str(trainer.global_rank), "a") as file:
            file.write(json.dumps([batch["id"], learned, batch["step_tokens"]]) + "\\n")
"""


@pytest.mark.slow
def test_two_processes(config: Path, tmp_path: Path) -> None:
    plugin, seen = tmp_path / "seen_plugin.py", str(tmp_path / "seen")
    plugin.write_text(PLUGIN)
    # 4 steps are a buffer of 8 rows; the next one would begin some of 15 anew
    ddp = (*STREAM, "--trainer.max_steps", "4", "--trainer.strategy", "ddp", "--plugins", f"[{plugin}]", *SELDOM)
    watched = ("--trainer.callbacks+", "seen_plugin.Seen", *COUNT, str(tmp_path / "full"))
    fit(config, tmp_path / "full", *ddp, *watched, ranks=2, SEEN=seen)
    first, second = ([json.loads(line) for line in (tmp_path / f"seen{r}").read_text().splitlines()] for r in (0, 1))
    rows = [{name for names, *_ in batches for name in names} for batches in (first, second)]
    assert not rows[0] & rows[1] and len(rows[0]) == len(rows[1]) == 8
    for (_, a, tokens), (_, b, same) in zip(first, second):
        assert tokens == same == a + b
    steps = json.loads((tmp_path / "full/collectives.0").read_text())
    # the first two steps, of which the second is logged: the devices add up losses, and whether all is finite
    assert [[c for c in step if c != "hosts"] for step in steps[:2]] == [["all_reduce", "all_reduce"]] * 2


@pytest.mark.slow
def test_an_interrupted_stream_is_bit_for_bit(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path / "full", *STREAM)
    interrupt(config, tmp_path / "cut", 4, *STREAM)
    other = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "cut"), *STREAM]
    run = Run.start(tmp_path / "other", [*other, "--data.shuffle_buffer", "9", "--ckpt_path", "last"])
    assert run.wait() == [2]
    assert "with data.shuffle_buffer 8 (now 9)" in run.log()
    fit(config, tmp_path / "cut", *STREAM, "--ckpt_path", "last")
    same_runs(tmp_path / "cut", tmp_path / "full")
