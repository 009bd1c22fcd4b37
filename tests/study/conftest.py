"""What the studies of tiny models share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from tests.data.tiny import save_model


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, questions whose answer is the first letter, and the config that all runs share."""
    folder, draw = tmp_path_factory.mktemp("project"), random.Random(0)
    save_model(folder / "model")
    rows = []
    for i in range(60):
        first, second = draw.sample("abcdefgh", 2)
        rows.append({"id": f"q{i}", "question": f"{first}{second}", "choices": [first * 3, second * 3], "label": 0})
    for name, part in {"train": rows[:24], "val": rows[24:36], "test": rows[36:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "val", "test")}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
        },
        "model": {"base": {"path": str(folder / "model")}, "evaluation": {"compare_base": False}},
        "data": {**data, "rows": "choice", "batch_size": 8, "max_length": 64, "cache_dir": str(folder / "cache")},
        "load_balance": {"figures": False},
    }
    (folder / "common.yaml").write_text(yaml.safe_dump(config))
    return folder
