from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from talklora_pl.adapter import AdapterConfig
from talklora_pl.base import BaseModel
from talklora_pl.data import TextData
from talklora_pl.module import FineTuner
from tests.data.tiny import save_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Two tasks, one source each: a file whose texts are of unequal length."""
    sources = []
    for task, words in (("sums", "12345"), ("words", "abcde")):
        lines = [
            {"question": " ".join(words[i % 5] * (1 + i % 4)), "choices": [words[i % 5], "no"], "label": 0}
            for i in range(24)
        ]
        path = tmp_path_factory.mktemp("data") / f"{task}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources.append({"path": str(path), "task": task})
    return sources


@pytest.fixture
def fit(base: BaseModel, rows: list[dict[str, str]], tmp_path: Path) -> Callable[..., L.Trainer]:
    """Train a tiny model; returns the trainer."""

    def run(
        *callbacks: L.Callback,
        adapter: AdapterConfig | None = None,
        module: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        ckpt: str | None = None,
        **trainer: Any,
    ) -> L.Trainer:
        from talklora_pl.data.source import Source

        torch.manual_seed(0)
        sources: list[Any] = [Source(**s) for s in rows]
        options: dict[str, Any] = {
            "train": sources,
            "rows": "choice",
            "batch_size": 4,
            "val_size": 8,
            "max_length": 128,
            "length_grouped": False,
        }
        model = FineTuner(base, adapter or AdapterConfig(rank=8, dropout_input=0.0), **(module or {}))
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "max_steps": 4,
            "log_every_n_steps": 2,
            "logger": TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
        }
        made = L.Trainer(**defaults | trainer, callbacks=list(callbacks))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .* does not have many workers")
            made.fit(model, TextData(**options | (data or {})), ckpt_path=ckpt)
        return made

    return run
