"""The table of docs/deploy.md, executed."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from talklora_pl import export_adapter, load_adapter
from talklora_pl.cli import main
from tests.adapter.test_rows import model_with
from tests.data.tiny import save_model, tokenizer
from tests.export.models import train
from tests.methods.test_configs import config_of

PAGE = (Path(__file__).parents[1] / "docs/deploy.md").read_text()
# those of the second table: tests/export/test_static.py
ROWS = re.findall(r"^\|.*\| `(.*)` \|$", PAGE.partition("## Talk to it")[0], re.MULTILINE)
TOOLS = [row for row in ROWS if row.startswith("python -m talklora_pl")]
PYTHON = [row for row in ROWS if not row.startswith(("python -m", "transformers"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    save_model(folder / "base", initializer_range=0.2)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    train(model, config_of("talklora"), seed=1)
    export_adapter(model, folder / "ADAPTER", tokenizer=tokenizer())
    return folder


def test_every_line_is_of_a_known_kind() -> None:
    assert len(TOOLS) == 4 and len(PYTHON) == 4 and len(ROWS) == 10  # the other two: tests/export/test_serve.py


@pytest.mark.slow
def test_tools(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    Path("rows.jsonl").write_text('{"prompt": "1 and one?", "completion": "2"}\n' * 4)
    fit = ["fit", "--config", "method/talklora", "--model.base.path", "base", "--data.train", "rows.jsonl"]
    fit += ["--data.val_size", "1", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    assert main([*fit, "--trainer.default_root_dir", "runs"]) == 0
    for line in TOOLS:
        words = [{"RUN": "runs/version_0"}.get(word, word) for word in shlex.split(line)[3:]]
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        more = ["--max_new_tokens", "3"] if words[0] == "chat" else []
        assert main([*words, *more]) == 0, line
    assert (folder / "NEW/talklora.json").is_file() and "strongest expert" in capsys.readouterr().out


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    names: dict[str, Any] = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "pipeline": pipeline,
        "load_adapter": load_adapter,
        "model": AutoModelForCausalLM.from_pretrained("base"),
        "batch": {"input_ids": ids},
    }
    for line in PYTHON:
        if "adapter_names" in line:
            names["model"] = model_with(["talklora"] * 2)
        found = eval(line, names)
        model = found.model if hasattr(found, "tokenizer") else found
        assert "logits" in found if "adapter_names" in line else model is not None
