"""Interrupted and resumed equals uninterrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.runs import Run, curves, distance, fit, load, newest

LONG = ("--trainer.max_steps", "12")
# everything whose state a resumed run could lose: dropout, accumulation, a schedule, loader processes, momentum
RICH = (
    *("--model.adapter.dropout_input", "0.1", "--trainer.accumulate_grad_batches", "2", "--data.num_workers", "1"),
    *("--model.lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr", "0.02"),
    *("--model.lr_scheduler.total_steps", "20", "--trainer.val_check_interval", "6", "--trainer.max_steps", "10"),
)


def interrupt(config: Path, folder: Path, step: int, *options: str, where: str = "train", ranks: int = 1) -> None:
    """Run until a signal at `step`, from the last checkpoint if there is one."""
    fault = ["--trainer.callbacks+=tests.distributed.faults.SignalAt", "--trainer.callbacks.step", str(step)]
    fault += ["--trainer.callbacks.where", where, "--trainer.callbacks.rank", str(ranks - 1)]
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
    run = Run.start(folder, [*argv, *options, *fault], ranks)
    codes = run.wait()
    assert codes == [143] * ranks, (step, codes, run.log())


def same_runs(folder: Path, full: Path, tolerance: float = 0.0) -> None:
    assert distance(newest(folder), newest(full)) <= tolerance
    logged, expected = curves(folder), curves(full)
    assert logged.keys() == expected.keys() >= {"train_loss", "val_loss"}
    for name, a in logged.items():
        b = expected[name]
        assert [step for step, _ in a] == [step for step, _ in b], name
        assert a == b if tolerance == 0 else [x for _, x in a] == pytest.approx([x for _, x in b], rel=1e-5), name
    assert len(list(folder.glob("version_*"))) == 1  # a resumed run continues its folder


@pytest.mark.slow
def test_interrupted_at_every_step_is_bit_for_bit(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path / "full", *RICH)
    for step in range(10):
        interrupt(config, tmp_path / "cut", step, *RICH)
        assert load(newest(tmp_path / "cut"))["global_step"] == step + 1
    fit(config, tmp_path / "cut", *RICH, "--ckpt_path", "last")
    same_runs(tmp_path / "cut", tmp_path / "full")


def test_interrupted_in_step_epoch_end_and_validation(config: Path, tmp_path: Path) -> None:
    fit(config, tmp_path / "full", *LONG)
    fit(config, tmp_path / "cut", "--trainer.max_steps", "1")  # a finished run goes on, too
    interrupt(config, tmp_path / "cut", 2, *LONG)
    interrupt(config, tmp_path / "cut", 7, *LONG)  # the epoch's last step, before its validation
    interrupt(config, tmp_path / "cut", 8, *LONG, where="validation")
    interrupt(config, tmp_path / "cut", 9, *LONG)
    fit(config, tmp_path / "cut", *LONG, "--ckpt_path", "last")
    same_runs(tmp_path / "cut", tmp_path / "full")


@pytest.mark.slow
def test_across_strategies(config: Path, tmp_path: Path) -> None:
    """Two processes, sharded on two, one that accumulates, one."""
    fit(config, tmp_path / "full", *LONG)
    cut = tmp_path / "cut"
    two = (*LONG, "--data.batch_size", "2", "--trainer.strategy")
    interrupt(config, cut, 2, *two, "ddp", ranks=2)
    interrupt(config, cut, 5, *two, "fsdp", ranks=2)
    interrupt(config, cut, 6, *LONG, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2")
    interrupt(config, cut, 9, *two, "ddp", ranks=2)
    fit(config, cut, *LONG, "--ckpt_path", "last")
    same_runs(cut, tmp_path / "full", 1e-11)


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["--model.adapter.num_experts", "2"], "adapter.num_experts: 4 in the checkpoint, 2 in this run"),
        (
            ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"],
            "'AdamW'] in the checkpoint, ['SGD']",
        ),
        (["--model.base.path", "OTHER"], "base.weights: "),
        (["--data.batch_size", "2"], "rows of an optimiser step"),
    ],
)
def test_another_method_is_refused_by_name(
    config: Path, started: Path, tmp_path: Path, typed: list[str], named: str
) -> None:
    if typed[-1] == "OTHER":  # another random model of the same shape
        model = AutoModelForCausalLM.from_pretrained(config.parent / "model")
        model.lm_head.weight.data += 0.1
        typed = [typed[0], str(shutil.copytree(config.parent / "model", tmp_path / "other"))]
        model.save_pretrained(typed[-1])
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(started)]
    run = Run.start(tmp_path, [*argv, *typed])
    assert run.wait() == [2]
    assert named in run.log() and "Traceback" not in run.log(), run.log()


@pytest.fixture(scope="module")
def started(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(config, tmp_path_factory.mktemp("started"), "--trainer.max_steps", "3")


def test_weights_alone_are_no_state_to_go_on_from(config: Path, started: Path, tmp_path: Path) -> None:
    """What Lightning's ModelCheckpoint writes with save_weights_only."""
    weights = {k: v for k, v in load(started).items() if k not in ("optimizer_states", "lr_schedulers")}
    torch.save(weights, tmp_path / "weights.ckpt")
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path)]
    run = Run.start(tmp_path, [*argv, "--ckpt_path", str(tmp_path / "weights.ckpt")])
    assert run.wait() == [2]
    assert "weights.ckpt holds weights only" in run.log() and "Traceback" not in run.log(), run.log()


def test_what_is_typed_wins(config: Path, started: Path, tmp_path: Path) -> None:
    """Learning rate 0 from step 3 on: nothing moves any more, though the checkpoint remembers 0.01."""
    last = fit(config, tmp_path, "--ckpt_path", str(started), "--model.optimizer.lr", "0.0")
    a, b = load(started)["state_dict"], load(last)["state_dict"]
    assert load(last)["global_step"] == 8 and all((a[k] == b[k]).all() for k in a)


def test_interrupted_after_an_epoch_without_validation(config: Path, tmp_path: Path) -> None:
    """And again in the epoch that follows: its beginning must have been counted."""
    options = ("--trainer.max_steps", "11", "--trainer.val_check_interval", "3")
    fit(config, tmp_path / "full", *options)
    for step in (7, 8):
        interrupt(config, tmp_path / "cut", step, *options)
    fit(config, tmp_path / "cut", *options, "--ckpt_path", "last")
    same_runs(tmp_path / "cut", tmp_path / "full")
