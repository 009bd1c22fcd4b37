"""Batches by tokens: every layout makes the same steps, and an interrupted run goes on with the same packs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import Run, curves, distance, fit
from tests.distributed.test_equal import same_curve
from tests.distributed.test_resume import interrupt, same_runs

PACKED = ("--data.max_tokens", "64", "--config", "method/lossfree", "--model.adapter.dtype", "float64")
PACKED = (*PACKED, "--model.adapter.balance", "[]", "--trainer.max_steps", "6", "--trainer.val_check_interval", "3")


@pytest.mark.slow
def test_packed_layouts_equal_one(config: Path, tmp_path: Path) -> None:
    """Two micro-batches a step, one after the other or at the same time; both end an epoch, one with a filler."""
    one = fit(config, tmp_path / "one", *PACKED, "--trainer.accumulate_grad_batches", "2")
    assert {share for _, share in curves(tmp_path / "one", costs=True)["cost/pad_share"]} == {0.0}
    for strategy in ("ddp", "fsdp"):
        two = fit(config, tmp_path / strategy, *PACKED, "--trainer.strategy", strategy, ranks=2)
        assert distance(two, one) < 1e-11, strategy
        assert same_curve(tmp_path / strategy, tmp_path / "one")
        said = (tmp_path / strategy / "log0").read_text()
        assert "batches of at most 64 tokens, packed without pads (sdpa, with a block-diagonal mask)" in said


@pytest.mark.slow
def test_packed_and_interrupted_is_bit_for_bit(config: Path, tmp_path: Path) -> None:
    options = (*PACKED, "--model.adapter.dropout_input", "0.1")
    fit(config, tmp_path / "full", *options)
    for step in (1, 4):
        interrupt(config, tmp_path / "cut", step, *options)
    fit(config, tmp_path / "cut", *options, "--ckpt_path", "last")
    same_runs(tmp_path / "cut", tmp_path / "full")
    other = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "cut"), *options]
    run = Run.start(tmp_path / "other", [*other, "--data.max_tokens", "80", "--ckpt_path", "last"])
    assert run.wait() == [2]
    assert "max_tokens" in run.log()
