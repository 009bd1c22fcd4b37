"""Decoder layers that are compiled one by one, in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import curves, fit


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_fit(config: Path, tmp_path: Path, strategy: str) -> None:
    """Two processes, accumulation and checkpointing, by the command line."""
    options = ("--trainer.max_steps", "3", "--trainer.accumulate_grad_batches", "2", "--model.gradient_checkpointing")
    options = (*options, "true", "--trainer.strategy", strategy, "--data.batch_size", "2")
    # torch 2.11 takes float64 for float32 where it compiles fused attention
    options = (*options, "--model.base.attn_implementation", "eager")
    fit(config, tmp_path / "eager", *options, ranks=2)
    fit(config, tmp_path / "compiled", *options, "--model.compile", "layers", ranks=2)
    said = (tmp_path / "compiled" / "log0").read_text()
    assert "not compiled" not in said, said
    a, b = (curves(tmp_path / name)["train_loss"] for name in ("eager", "compiled"))
    assert [v for _, v in b] == pytest.approx([v for _, v in a], rel=1e-6)
