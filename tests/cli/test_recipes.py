"""Shipped configs: all of them parse and build; the paper's run at its real size, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, PreTrainedModel

from talklora_pl.cli.lightning import CLI
from talklora_pl.cli.options import shipped_configs
from talklora_pl.module import FineTuner, trained_tensors
from tests.conftest import LLAMA3_8B
from tests.data.tiny import save_model, tokenizer


def parsed(*argv: str, monkeypatch: pytest.MonkeyPatch) -> FineTuner:
    """Parse a command line up to, but not including, the fit."""
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, verb: None)
    return CLI("fit", list(argv)).model


def test_the_papers_run_on_llama3_8b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaConfig(**LLAMA3_8B, max_position_embeddings=8192).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}]')
    built: list[tuple[PreTrainedModel, int]] = []
    inject = FineTuner._inject

    def injected(self: FineTuner, model: PreTrainedModel, *args: Any) -> None:
        inject(self, model, *args)
        built.append((model, sum(p.numel() for p in trained_tensors(model).values())))

    monkeypatch.setattr(FineTuner, "_inject", injected)
    args = ["--config", "recipe/talklora_llama3_8b", "--model.base.path", str(tmp_path), "--data.train", str(rows)]
    model = parsed(*args, monkeypatch=monkeypatch)
    (llama, trained), *_ = built
    assert trained == 32_307_712
    assert llama.model.embed_tokens.weight.is_meta and llama.num_parameters() > 8e9
    config = model.adapter_config
    assert (config.dropout_input, config.dropout_routing, config.dropout_output, config.scale()) == (
        0.05,
        0.05,
        0.05,
        1,
    )
    optimizer = model.optimizer([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (3e-4, 0.01)


def test_every_shipped_config_is_a_mapping_with_a_comment_on_top() -> None:
    files = list(shipped_configs().rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        text = file.read_text()
        assert text.startswith("# "), f"{file.name}: say in a comment what it is"
        assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("method", sorted(p.stem for p in (shipped_configs() / "method").glob("*.yaml")))
def test_every_method_builds_on_a_llama_by_name(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model(tmp_path, hidden_size=32, num_hidden_layers=4)
    model = parsed(
        "--config", f"method/{method}", "--model.base.path", base.path, monkeypatch=monkeypatch
    )  # parsing checks it on the meta device
    assert model.adapter_config.problems() == []
