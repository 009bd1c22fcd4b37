"""Lightning's own callbacks and settings from the command line: each works, or is refused with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from talklora_pl.cli import main
from talklora_pl.cli.lightning import CLI, run
from tests.data.tiny import save_model

pytestmark = pytest.mark.slow  # whole fits, one after the other


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, twelve rows to train on in batches of two, three to validate, and a config."""
    folder = tmp_path_factory.mktemp("others")
    save_model(folder / "base")
    rows = [{"prompt": f"{i} and one?", "completion": str(i + 1)} for i in range(15)]
    for name, part in (("train", rows[:12]), ("val", rows[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    config = {
        "model": {
            "base": {"path": str(folder / "base"), "dtype": "float32"},
            "adapter": {"rank": 8, "dropout_input": 0.0},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "train": str(folder / "train.jsonl"),
            "val": str(folder / "val.jsonl"),
            "batch_size": 2,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
        "load_balance": {"figures": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def argv(folder: Path, root: Path, *args: str) -> list[str]:
    return ["--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(root), *args]


def fit(folder: Path, root: Path, *args: str) -> CLI:
    return run("fit", argv(folder, root, *args))


def callback(name: str, **options: Any) -> list[str]:
    return [f"--trainer.callbacks+={json.dumps({'class_path': name, 'init_args': options})}"]


def trained(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_batch_size_finder_leaves_the_run_that_the_size_makes(folder: Path, tmp_path: Path) -> None:
    finder = callback("BatchSizeFinder", max_trials=2, steps_per_trial=2)
    found = fit(folder, tmp_path / "found", *finder)
    assert found.datamodule.batch_size == 4
    fit(folder, tmp_path / "given", "--data.batch_size", "4")
    assert same(trained(tmp_path / "found"), trained(tmp_path / "given"))


def test_learning_rate_finder_leaves_the_run_that_the_rate_makes(folder: Path, tmp_path: Path) -> None:
    schedule = ("--model.lr_scheduler", "WarmupLinear", "--model.lr_scheduler.warmup_steps", "3")
    schedule += ("--trainer.max_epochs", "4")
    finder = callback("LearningRateFinder", num_training_steps=20, max_lr=0.1, early_stop_threshold=None)
    found = fit(folder, tmp_path / "found", *schedule, *finder)
    rate = next(c for c in found.trainer.callbacks if hasattr(c, "optimal_lr")).optimal_lr.suggestion()
    assert rate not in (None, 0.01)
    fit(folder, tmp_path / "given", *schedule, "--model.optimizer.lr", repr(rate))
    assert same(trained(tmp_path / "found"), trained(tmp_path / "given"))


def test_a_finder_is_for_new_runs(folder: Path, tmp_path: Path, capsys: Any) -> None:
    fit(folder, tmp_path)
    options = ("--ckpt_path", "last", "--trainer.max_epochs", "3", *callback("BatchSizeFinder"))
    assert main(["fit", *argv(folder, tmp_path, *options)]) == 2
    assert "BatchSizeFinder looks for its value at the beginning of a run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "lightning.pytorch.cli.ReduceLROnPlateau"])
def test_plateau_is_looked_at_after_every_validation(folder: Path, tmp_path: Path, name: str) -> None:
    """Every validation is no better by a threshold that nothing meets, so each halves the rate, the first excepted."""
    options = {"monitor": "val_loss", "factor": 0.5, "patience": 0, "threshold": 1.0, "threshold_mode": "abs"}
    plan = f"--model.lr_scheduler={json.dumps({'class_path': name, 'init_args': options})}"
    interval = ("--trainer.val_check_interval", "3")
    done = fit(folder, tmp_path / "whole", plan, *interval)
    assert done.model.learning_rate == 0.01 / 2**3  # four validations
    fit(folder, tmp_path / "cut", plan, *interval, "--trainer.max_epochs", "1")
    fit(folder, tmp_path / "cut", plan, *interval, "--ckpt_path", "last")
    assert same(trained(tmp_path / "whole"), trained(tmp_path / "cut"))


def test_plateau_must_say_what_it_watches(folder: Path, tmp_path: Path, capsys: Any) -> None:
    torchs = ("--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau")
    assert main(["fit", *argv(folder, tmp_path, *torchs)]) == 2
    assert "monitor: val_loss" in capsys.readouterr().err
    wrong = ("--model.lr_scheduler", "ReduceLROnPlateau", "--model.lr_scheduler.monitor", "val_los")
    assert main(["fit", *argv(folder, tmp_path, *wrong)]) == 2
    assert "watches 'val_los', which is not logged. Did you mean 'val_loss'" in capsys.readouterr().err


def test_early_stopping_waits_for_the_first_validation(folder: Path, tmp_path: Path, capsys: Any) -> None:
    late = ("--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "20")
    stop = callback("EarlyStopping", monitor="val_loss", check_on_train_epoch_end=True, min_delta=10.0, patience=1)
    assert fit(folder, tmp_path / "late", *late, *stop).trainer.current_epoch < 6
    assert main(["fit", *argv(folder, tmp_path / "wrong", *callback("EarlyStopping", monitor="val_los"))]) == 2
    assert "EarlyStopping watches 'val_los', which is not logged. Did you mean 'val_loss'" in capsys.readouterr().err
    none = ("--trainer.limit_val_batches", "0", *callback("EarlyStopping", monitor="val_loss"))
    assert main(["fit", *argv(folder, tmp_path / "none", *none)]) == 2
    assert "this run does not validate" in capsys.readouterr().err


def test_accumulation_by_epoch_is_known_to_the_batches(folder: Path, tmp_path: Path) -> None:
    """Twice as many micro-batches of half the size are the same steps, from the first epoch on and after a resume."""
    schedule = callback("GradientAccumulationScheduler", scheduling={0: 2, 1: 3})
    small = ("--data.batch_size", "2", *schedule)
    fit(folder, tmp_path / "whole", *small)
    fit(folder, tmp_path / "cut", *small, "--trainer.max_steps", "4", "--trainer.max_epochs", "-1")
    assert fit(folder, tmp_path / "cut", *small, "--ckpt_path", "last").trainer.global_step == 3 + 2
    assert same(trained(tmp_path / "whole"), trained(tmp_path / "cut"))
    fit(folder, tmp_path / "one", "--data.batch_size", "4", "--trainer.max_epochs", "1")
    fit(folder, tmp_path / "two", *small, "--trainer.max_epochs", "1")
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "base", "adapter"),
    [
        ("bf16-true", torch.bfloat16, torch.float32),
        ("16-true", torch.float16, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_true_precision_is_about_the_base(
    folder: Path, tmp_path: Path, precision: str, base: torch.dtype, adapter: torch.dtype
) -> None:
    done = fit(folder, tmp_path, "--trainer.precision", precision, "--trainer.max_steps", "1", "--guard.skip", "1")
    assert {p.dtype for p in done.model.trained().values()} == {adapter}
    assert {p.dtype for p in done.model.model.parameters() if not p.requires_grad} == {base}
    saved = trained(tmp_path)
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {adapter}


def test_an_interval_longer_than_an_epoch_counts_across_epochs(folder: Path, tmp_path: Path, caplog: Any) -> None:
    steps = list[int]()

    class Steps(CLI):
        def before_fit(self) -> None:
            end = self.model.on_validation_epoch_end
            self.model.on_validation_epoch_end = lambda: (steps.append(self.trainer.global_step), end())

    with caplog.at_level("INFO"):
        run("fit", argv(folder, tmp_path, "--trainer.val_check_interval", "9", "--trainer.max_epochs", "4"), Steps)
    assert steps == [9, 18]  # of epochs of 6
    assert any("9 batches are more than the 6 of an epoch" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (callback("StochasticWeightAveraging", swa_lrs=0.01), "would average nothing"),
        (callback("WeightAveraging"), "second copy of the whole model"),
        (callback("EMAWeightAveraging"), "second copy of the whole model"),
        (callback("BackboneFinetuning"), "the base stays frozen"),
        (callback("ModelPruning", pruning_fn="l1_unstructured"), "renames the tensors"),
        (callback("OnExceptionCheckpoint", dirpath="here"), "--ckpt_path last"),
        (
            [*callback("LearningRateFinder"), "--model.param_groups=[{match: router, lr: 0.1}]"],
            "model.param_groups has several",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: Any, options: list[str], reason: str
) -> None:
    assert main(["fit", *argv(folder, tmp_path / "runs", *options)]) == 2
    said = capsys.readouterr().err
    assert reason in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    "options",
    [
        callback("Timer", duration="00:01:00:00"),
        callback("ModelCheckpoint", monitor="val_loss", save_top_k=2),
        callback("LearningRateMonitor"),
        callback("DeviceStatsMonitor"),
        callback("ModelSummary"),
        callback("LambdaCallback"),
    ],
    ids=lambda options: options[0].split('"')[3],
)
def test_the_others_change_nothing(folder: Path, tmp_path: Path, options: list[str]) -> None:
    """Bit for bit the run without them, and a config.yaml that runs again."""
    fit(folder, tmp_path / "with", *options, "--trainer.max_epochs", "1")
    fit(folder, tmp_path / "without", "--trainer.max_epochs", "1")
    assert same(trained(tmp_path / "with"), trained(tmp_path / "without"))
    again = tmp_path / "with/version_0/config.yaml"
    assert main(["fit", "--config", str(again), "--trainer.default_root_dir", str(tmp_path / "again")]) == 0


NUMBERS = """
import sys
{first}
from talklora_pl.cli.lightning import run
argv = sys.argv[1:] + ["--trainer.limit_val_batches", "1", "--trainer.limit_train_batches", "1.0"]
trainer = run("fit", argv + ["--trainer.max_steps", "1"]).trainer
print("read", repr(trainer.limit_val_batches), repr(trainer.limit_train_batches))
"""


@pytest.mark.parametrize(
    "first",
    [
        "from talklora_pl.adapter import AdapterConfig",
        "from typing import Optional, Union; kept = Optional[Union[float, int]]",
        *(
            pytest.param(first, marks=pytest.mark.nightly)
            for first in ("", "from typing import Optional, Union; kept = Optional[Union[int, float]]")
        ),
    ],
)
def test_numbers_mean_the_same_whatever_was_imported_before(folder: Path, tmp_path: Path, first: str) -> None:
    program = [sys.executable, "-c", NUMBERS.format(first=first), *argv(folder, tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "read 1 1.0" in done.stdout, done.stdout + done.stderr
    kept = yaml.safe_load((tmp_path / "version_0/config.yaml").read_text())["trainer"]
    assert repr((kept["limit_val_batches"], kept["limit_train_batches"])) == "(1, 1.0)"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trainer.accumulate", "trainer.accumulate_grad_batches"),
        ("trainer.max_step", "trainer.max_steps"),
        ("epochs", "trainer.max_epochs"),
        ("batch_size", "data.batch_size"),
        ("model.adapter.experts_see", "model.adapter.experts_see_talk"),
    ],
)
def test_abbreviations_are_answered(folder: Path, tmp_path: Path, capsys: Any, typed: str, meant: str) -> None:
    assert main(["fit", *argv(folder, tmp_path, f"--{typed}", "1")]) == 2
    hint = capsys.readouterr().err.partition("Did you mean ")[2].partition("?")[0]
    assert meant in hint.split(" or ")
