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


def talklora(verb: str, folder: Path, *options: str) -> dict[str, str]:
    """Run the command line; every file that it wrote, by name."""
    root = folder / verb / "".join(c for c in "".join(options) if c.isalnum())
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "talklora_pl", verb, "--config", "method/talklora", "--config", "my.yaml"]
    common = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root), "--trainer.strategy", "ddp"]
    subprocess.run([*command, *common, *options], cwd=folder, env=environment, check=True, timeout=300)
    return {file.name: file.read_text() for file in root.rglob("*.json*")}


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", initializer_range=0.2)
    quiz = [{"question": f"q{i}", "choices": ["x", "yy", "zzz"][: 2 + i % 2], "label": i % 2} for i in range(9)]
    sums = [{"prompt": "p" * i, "completion": str(i)} for i in range(1, 6)]
    for name, rows in (("quiz", quiz), ("sums", sums)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"base": {"path": model.path, "dtype": "float32"}, "evaluation": {"max_new_tokens": 4}},
        "data": {
            "test": [{"path": "quiz.jsonl", "rows": "choice"}, {"path": "sums.jsonl", "rows": "completion"}],
            "eval_batch_size": 5,
            "max_length": 64,
        },
    }
    (tmp_path / "my.yaml").write_text(json.dumps(config))
    for verb, name in (("test", "test_scores.json"), ("predict", "predictions.jsonl")):
        one, two = (talklora(verb, tmp_path, "--trainer.devices", n)[name] for n in "12")
        parse = json.loads if verb == "test" else lambda text: [json.loads(line) for line in text.splitlines()]
        assert _rounded(parse(one)) == _rounded(parse(two))
        assert len(parse(one)) == (2 if verb == "test" else 14)


def _rounded(value: object) -> object:
    """Padding differs between layouts, and float32 with it."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value
