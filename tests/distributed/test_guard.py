"""A loss or gradient that is no number never reaches the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from talklora_pl.distributed.checkpoint import read_checkpoint
from tests.distributed.runs import Run, distance, fit, newest


def poisoned(config: Path, folder: Path, batches: list[int], what: str, *options: str, ranks: int = 1) -> Run:
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder), *options]
    argv += ["--trainer.callbacks+=tests.distributed.faults.Poison", "--trainer.callbacks.batches", str(batches)]
    argv += ["--trainer.callbacks.what", what, "--trainer.callbacks.rank", str(ranks - 1)]
    return Run.start(folder, argv, ranks)


FUSED = ("--model.optimizer.init_args.fused", "true")  # the step is left out on the device, and the host hears later


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stops_one_step_later_if_the_device_decides(config: Path, tmp_path: Path, what: str) -> None:
    run = poisoned(config, tmp_path, [3], what, *FUSED)
    assert run.wait() == [2], run.log()
    log = run.log()
    assert f"The {what} of step 4 is not finite; example ids: [['r" in log and "goes on after step 5" in log, log
    saved = read_checkpoint(next(tmp_path.glob("**/nonfinite.ckpt")))
    # step 4 took no part in it, and step 5 did
    skips = poisoned(config, tmp_path / "skips", [3], what, *FUSED, "--guard.skip", "1", "--trainer.max_steps", "5")
    assert skips.wait() == [0], skips.log()
    waits = poisoned(config, tmp_path / "waits", [3], what, "--guard.skip", "1", "--trainer.max_steps", "5")
    assert waits.wait() == [0], waits.log()
    assert saved["global_step"] == 5
    for folder, bound in (("skips", 0), ("waits", 1e-12)):  # the fused kernel rounds in its own way
        state = read_checkpoint(newest(tmp_path / folder))["state_dict"]
        assert all((t - saved["state_dict"][name]).abs().max() <= bound for name, t in state.items())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stops_with_ids_and_a_saved_state(config: Path, tmp_path: Path, what: str) -> None:
    run = poisoned(config, tmp_path, [3], what)
    assert run.wait() == [2], run.log()
    log = run.log()
    assert f"The {what} of step 4 is not finite; example ids: [['r" in log and "Traceback" not in log, log
    saved = next(tmp_path.glob("**/nonfinite.ckpt"))
    state = read_checkpoint(saved)["state_dict"]
    assert all(torch.isfinite(t).all() for t in state.values())
    before = fit(config, tmp_path / "three", "--trainer.max_steps", "3")
    assert all(torch.equal(t, read_checkpoint(before)["state_dict"][k]) for k, t in state.items())
    assert read_checkpoint(fit(config, tmp_path, "--ckpt_path", str(saved)))["global_step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "options"), [("ddp", ()), ("fsdp", FUSED)])
def test_skips_on_all_ranks(config: Path, tmp_path: Path, strategy: str, options: tuple[str, ...]) -> None:
    """One bad micro-batch of one rank: both leave out the whole step, up to the given number of steps."""
    two = (*options, "--trainer.strategy", strategy, "--data.batch_size", "1", "--trainer.accumulate_grad_batches", "2")
    run = poisoned(config, tmp_path / "two", [3, 9], "gradient", "--guard.skip", "2", *two, ranks=2)
    assert run.wait() == [0, 0], run.log()
    assert "(2 of at most 2)" in run.log()
    one = poisoned(config, tmp_path / "one", [1, 4], "gradient", "--guard.skip", "2")
    assert one.wait() == [0], one.log()
    assert distance(newest(tmp_path / "two"), newest(tmp_path / "one")) < 1e-11
    run = poisoned(config, tmp_path / "three", [3, 9, 10], "loss", "--guard.skip", "2", *two, ranks=2)
    assert 2 in run.wait() and "is not finite; example ids: [['r" in run.log(), run.log()


@pytest.mark.parametrize("options", [(), FUSED])
def test_a_step_left_out_does_not_count_in_routers_and_losses(
    config: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Biases of loss-free routing, counts of the Normal loss: as if the run had ended before that step."""
    method = ("--config", "method/lossfree", "--model.adapter.balance+=normal", "--model.adapter.balance+=poisson")
    method = (*method, *options)
    run = poisoned(config, tmp_path / "left_out", [3], "loss", "--guard.skip", "1", *method, "--trainer.max_steps", "4")
    assert run.wait() == [0], run.log()
    before = read_checkpoint(fit(config, tmp_path / "before", *method, "--trainer.max_steps", "3"))["state_dict"]
    after = read_checkpoint(newest(tmp_path / "left_out"))["state_dict"]
    assert {"bias", "counts"} <= {name.rsplit(".", 1)[-1] for name in before}, list(before)
    assert all(torch.equal(t, after[name]) for name, t in before.items())
