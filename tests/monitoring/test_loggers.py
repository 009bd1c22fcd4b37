"""W&B and MLflow, offline: the scalars, pictures, texts and description that TensorBoard has."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from talklora_pl.callbacks import LoadBalance, SampleOutputs
from tests.monitoring.test_load_balance import scalars

Fit = Callable[..., L.Trainer]
PICTURES = {"experts/allocation", "experts/load", "experts/tasks", "experts/communication"}


def both(fit: Fit, logger: Any, folder: Path) -> dict[str, float]:
    """Fit with TensorBoard beside another logger; the last values TensorBoard has."""
    board = TensorBoardLogger(folder, name="", version="run", default_hp_metric=False)
    fit(LoadBalance(), SampleOutputs(1, max_new_tokens=2), val_check_interval=2, logger=[board, logger])
    return {name: values[max(values)] for name, values in scalars(folder / "run").items()}


def equal(found: dict[str, float], expected: dict[str, float]) -> None:
    assert {"train_loss", "val_loss", "load/cv", "train/lr", "train/grad_norm", "cost/pad_share"} <= expected.keys()
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=1e-5, abs_tol=1e-6), name


@pytest.mark.slow
def test_wandb_offline(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    logger = WandbLogger("here", save_dir=tmp_path, offline=True, settings=wandb.Settings(console="off"))
    expected = both(fit, logger, tmp_path)
    experiment = logger.experiment
    equal(dict(experiment.summary), expected)
    assert experiment.config["communication"] == "talking" and experiment.config["num_experts"] == 4
    media = {str(p.relative_to(Path(experiment.dir) / "media")) for p in Path(experiment.dir, "media").rglob("*.*")}
    for tag in PICTURES:
        assert any(name.startswith(f"images/{tag}_") for name in media), tag
    assert any(name.startswith("table/samples") for name in media)
    experiment.finish()


@pytest.mark.slow
def test_mlflow_offline(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # its file store takes no names such as val_loss and val_loss/TASK together
    monkeypatch.chdir(tmp_path)
    logger = MLFlowLogger("here", tracking_uri="sqlite:///mlflow.db", artifact_location=str(tmp_path / "artifacts"))
    expected = both(fit, logger, tmp_path)
    run = logger.experiment.get_run(logger.run_id)
    equal(run.data.metrics, expected)
    assert run.data.params["communication"] == "talking" and run.data.params["num_experts"] == "4"
    kept = {f.path for tag in [*PICTURES, "samples"] for f in logger.experiment.list_artifacts(logger.run_id, tag)}
    assert {p.rpartition("/")[0] for p in kept} == PICTURES | {"samples"}
