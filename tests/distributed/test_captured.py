"""Recorded steps in two processes, which add their gradients as ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import curves, distance, fit


def options(folder: Path, *more: str) -> tuple[str, ...]:
    recorder = ("--trainer.callbacks+=tests.distributed.faults.Recorder", "--trainer.callbacks.file", f"{folder}/turns")
    return (*recorder, "--model.cuda_graph", "true", *more)


@pytest.mark.slow
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_a_fit_with_ddp(config: Path, tmp_path: Path, packs: bool) -> None:
    two = ("--trainer.max_steps", "12", "--trainer.accumulate_grad_batches", "2", "--trainer.strategy", "ddp")
    two = (*two, *(("--data.max_tokens", "64") if packs else ("--data.batch_size", "2")))
    plain = fit(config, tmp_path / "plain", *two, ranks=2)
    recorded = fit(config, tmp_path / "recorded", *two, *options(tmp_path), ranks=2)
    assert min(int((tmp_path / f"turns.{rank}").read_text()) for rank in range(2)) > 0
    assert distance(plain, recorded) < 1e-9
    a, b = (curves(tmp_path / name)["train_loss"] for name in ("plain", "recorded"))
    assert [v for _, v in b] == pytest.approx([v for _, v in a], rel=1e-6)


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_one_that_did_not_stop(config: Path, tmp_path: Path) -> None:
    whole = fit(config, tmp_path / "whole", *options(tmp_path, "--trainer.max_steps", "24"))
    first = fit(config, tmp_path / "half", *options(tmp_path, "--trainer.max_steps", "17"))
    turns = int((tmp_path / "turns.0").read_text())
    again = options(tmp_path, "--trainer.max_steps", "24", "--ckpt_path", str(first))
    assert turns > 0 and distance(whole, fit(config, tmp_path / "half", *again)) < 1e-9
