"""Studies of tiny models: every run once, whatever interrupts it, and numbers that follow from the files."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from talklora_pl.cli import main
from talklora_pl.study.plan import read_study
from talklora_pl.study.work import Folder
from tests.distributed.runs import Run
from tests.study.tiny import study


def test_a_study_is_made_once_and_its_numbers_follow_from_the_files(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study(project, set={"trainer.callbacks": [{"class_path": "talklora_pl.callbacks.RoutingSensitivity"}]})
    command = ["compare", f"--config={file}", f"--out={tmp_path}"]
    assert main(command) == 0
    names = [f"data.{m}.seed{s}" for m in ("lora", "talk") for s in (1, 2)]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == names
    results = {n: json.loads((tmp_path / "runs" / n / "result.json").read_text()) for n in names}
    assert all(r["status"] == "finished" and r["curve"][-1]["step"] == 4 for r in results.values())

    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    right: dict[str, Any] = {}
    for name in names:
        lines = (tmp_path / "runs" / name / "test_questions.jsonl").read_text().splitlines()
        right[name] = [json.loads(line)["right"] for line in lines]
        assert len(right[name]) == 24
        assert np.mean(right[name]) == pytest.approx(results[name]["scores"]["mean"]["accuracy"])
    for row in rows:
        of_seed = [np.mean(right[f"data.{row['method']}.seed{s}"]) for s in (1, 2)]
        assert row["score"] == pytest.approx(np.mean(of_seed)) and row["sd"] == pytest.approx(np.std(of_seed, ddof=1))
    assert rows[1]["difference"] == pytest.approx(rows[1]["score"] - rows[0]["score"])
    assert rows[1]["low"] <= rows[1]["difference"] <= rows[1]["high"]
    assert rows[1]["sensitivity"] > 0 and rows[1]["parameters"] != rows[0]["parameters"]
    assert 'src="data:image/png' in (tmp_path / "index.html").read_text()

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*")}
    capsys.readouterr()
    assert main(command) == 0  # nothing is left to do
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*")}
    assert "| data | talk | accuracy | 2 |" in capsys.readouterr().out


@pytest.mark.slow
def test_seeds_have_the_same_order_of_data_for_all_methods_and_a_base_is_loaded_once(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import talklora_pl.base as base
    from talklora_pl.objectives.sft import SFT

    loaded, seen, loss = [], list[list[int]](), SFT.loss
    real = base._load

    def load(what: Any, device: Any, meta: bool) -> Any:
        loaded.append(meta)
        return real(what, device, meta)

    def spy(self: SFT, model: Any, batch: Any) -> Any:
        seen[-1].append(batch["input_ids"].tolist())
        return loss(self, model, batch)

    monkeypatch.setattr(base, "_load", load)
    monkeypatch.setattr(SFT, "loss", spy)
    import talklora_pl.study.work as work

    make = work.make_run
    monkeypatch.setattr(work, "make_run", lambda *args: (seen.append([]), make(*args)))
    assert main(["compare", f"--config={study(project)}", f"--out={tmp_path}"]) == 0
    assert loaded.count(False) == 1
    assert len(seen) == 4 and seen[0] == seen[2] and seen[1] == seen[3] and seen[0] != seen[1]


@pytest.mark.slow
def test_search_chooses_on_validation_and_tests_only_what_it_chose(project: Path, tmp_path: Path) -> None:
    key = "model.optimizer.init_args.lr"
    file = study(project, search={key: [1e-6, 0.03]}, set={"model.optimizer.class_path": "torch.optim.AdamW"})
    assert main(["compare", f"--config={file}", f"--out={tmp_path}"]) == 0
    for row in json.loads((tmp_path / "results.json").read_text())["rows"]:
        trials = {lr: tmp_path / "runs" / f"data.{row['method']}.lr={lr}.seed1" for lr in (1e-6, 0.03)}
        losses = {lr: json.loads((run / "result.json").read_text())["selected"] for lr, run in trials.items()}
        best, other = sorted(losses, key=losses.__getitem__)
        assert row["choice"] == {key: best} and row["seeds"] == 2
        assert (trials[best] / "test_scores.json").exists() and not (trials[other] / "test_scores.json").exists()
        assert not (tmp_path / "runs" / f"data.{row['method']}.lr={other}.seed2").exists()


@pytest.mark.slow
def test_a_failed_run_is_a_row(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"config": "method/talklora", "set": {"model.adapter.rank": 7}}
    file = study(project, methods={"lora": {"config": "method/lora", "set": {"model.adapter.rank": 4}}, "bad": bad})
    assert main(["compare", f"--config={file}", f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert out.count("rank 7 is not divisible by num_experts 4") == 2
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == [0, 2] and rows[0]["seeds"] == 2


@pytest.mark.slow
def test_equal_numbers_of_parameters(project: Path, tmp_path: Path) -> None:
    file = study(project, match="parameters", baseline="talk", seeds=1)
    assert main(["compare", f"--config={file}", f"--out={tmp_path}"]) == 0
    lora, talk = (row["parameters"] for row in json.loads((tmp_path / "results.json").read_text())["rows"])
    one_rank = (
        lora
        / json.loads((tmp_path / "runs/data.lora.seed1/adapters/last/talklora.json").read_text())["adapter"][
            "expert_rank"
        ]
    )
    assert abs(lora - talk) <= one_rank / 2


@pytest.mark.slow
def test_a_study_is_not_continued_with_other_options(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", f"--config={study(project, seeds=1)}", f"--out={tmp_path}"]) == 0
    file = study(project, seeds=1, set={"trainer.max_steps": 6})
    assert main(["compare", f"--config={file}", f"--out={tmp_path}"]) == 2
    assert "was made with other options" in capsys.readouterr().err


def test_mistakes_of_a_study_come_in_one_message(
    tmp_path: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study(
        project,
        methods={"a": "method/talklra"},
        seeds=0,
        baseline="b",
        serch={},
        select="test_accuracy",
        match="size",
        set={"trainer.devices": 2},
    )
    assert main(["compare", f"--config={file}", f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    for words in ("'serch'", "method/talklora", "seeds:", "'b'", "test_accuracy", "'size'", "trainer.devices"):
        assert words in said, words
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_kills_and_two_processes_lose_nothing(project: Path, tmp_path: Path) -> None:
    """kill -9 twice, then two processes at once: every run as in a study that nobody touched."""
    file = study(project, set={"trainer.max_steps": 12})
    command = ["compare", f"--config={file}", f"--out={tmp_path / 'cut'}"]
    for checkpoints in (1, 2):
        run = Run.start(tmp_path / "log", command)
        (process,) = run.processes
        while len(list((tmp_path / "cut").glob("runs/*/checkpoints/last.ckpt"))) < checkpoints:
            assert process.exitcode is None, run.log()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    run = Run.start(tmp_path / "log", [*command, "--parallel=2"])
    assert run.wait(900) == [0], run.log()
    assert main(["compare", f"--config={file}", f"--out={tmp_path / 'whole'}"]) == 0
    one, other = (Folder(read_study(str(file)), tmp_path / name) for name in ("cut", "whole"))
    for cell in one.study.cells():
        for spec in one.chosen(*cell):
            answers = [(f.runs / spec.name / "test_questions.jsonl").read_text() for f in (one, other)]
            losses = [[c["val_loss"] for c in (f.result(spec) or {})["curve"]] for f in (one, other)]
            assert answers[0] == answers[1] and losses[0] == losses[1]
