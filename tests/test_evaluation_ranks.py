"""Scores and predictions of two processes are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.tiny import save_model

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from datetime import timedelta
from itertools import product
import lightning as L, torch
from talklora_pl import AdapterConfig, FineTuner, TextData
from talklora_pl.base import BaseModel
from talklora_pl.data import Source
from talklora_pl.distributed.fsdp import AdapterFSDP2Strategy
from talklora_pl.evaluation import Evaluation

torch.set_num_threads(1)
sources = [Source("quiz.jsonl", rows="choice"), Source("sums.jsonl", rows="completion")]
for name, work in product(sys.argv[1:], ("test", "predict")):
    base = BaseModel("model", dtype="float32")
    module = FineTuner(base, AdapterConfig(rank=8, targets="all-linear"), evaluation=Evaluation(max_new_tokens=4))
    data = TextData(test=sources, eval_batch_size=5, max_length=64)
    strategy = AdapterFSDP2Strategy(timeout=timedelta(seconds=60)) if name == "fsdp" else name
    trainer = L.Trainer(accelerator="cpu", devices=1 if name == "auto" else 2, strategy=strategy, logger=False,
                        default_root_dir=name, use_distributed_sampler=False, enable_progress_bar=False)
    getattr(trainer, work)(module, data, **{"test": {"verbose": False}, "predict": {"return_predictions": False}}[work])
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("fsdp", marks=pytest.mark.nightly)])
def test_two_processes_score_as_one(tmp_path: Path, strategy: str) -> None:
    """Also where they share a sharded model, and only one of them has something to generate."""
    save_model(tmp_path / "model", initializer_range=0.2)
    quiz = [{"question": f"q{i}", "choices": ["x", "yy", "zzz"][: 2 + i % 2], "label": i % 2} for i in range(9)]
    sums = [{"prompt": "p" * i, "completion": str(i)} for i in range(1, 6)]
    for name, rows in (("quiz", quiz), ("sums", sums)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    (tmp_path / "program.py").write_text(PROGRAM)
    # forked from one process that imports once; the launcher of fsdp starts the program itself a second time
    for names in [["auto", strategy]] if strategy == "ddp_fork" else [["auto"], [strategy]]:
        program = [sys.executable, "program.py", *names]
        subprocess.run(program, cwd=tmp_path, env=environment, check=True, timeout=400)
    one, two = (json.loads((tmp_path / n / "test_scores.json").read_text()) for n in ("auto", strategy))
    assert one["adapter"]["quiz"]["questions"] == 9 and one["adapter"]["sums"]["questions"] == 5
    assert _rounded(one) == _rounded(two)
    one, two = (
        [_rounded(json.loads(line)) for line in (tmp_path / n / "predictions.jsonl").read_text().splitlines()]
        for n in ("auto", strategy)
    )
    assert len(one) == 14
    assert one == two


def _rounded(value: object) -> object:
    """Padding differs between layouts, and float32 with it."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 3) if isinstance(value, float) else value
