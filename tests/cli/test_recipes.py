"""Shipped configs: all of them parse and build; the paper's run at its real size, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, RobertaConfig

import talklora_pl
from talklora_pl.cli.lightning import CLI
from talklora_pl.cli.options import shipped_configs
from talklora_pl.module import FineTuner, trained_tensors
from tests.conftest import LLAMA3_8B
from tests.data.tiny import save_model, tokenizer


def parsed(*argv: str, monkeypatch: pytest.MonkeyPatch) -> FineTuner:
    """Parse a command line up to, but not including, the fit."""
    return parsed_cli(*argv, monkeypatch=monkeypatch).model


def parsed_cli(*argv: str, monkeypatch: pytest.MonkeyPatch) -> CLI:
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, verb: None)
    return CLI("fit", list(argv))


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


ROBERTA = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=50265)
MISTRAL = LLAMA3_8B | dict(vocab_size=32000)
PAPERS = {
    "talklora_llama3_8b": (LlamaConfig(**LLAMA3_8B, max_position_embeddings=8192), 32_307_712),
    "graphlora_llama3_8b": (LlamaConfig(**LLAMA3_8B, max_position_embeddings=8192), 64_622_656),
    "alphalora_mistral_7b": (MistralConfig(**MISTRAL), 111_083_520),
    # 0.3 million, and the head: dense and the two classes
    "talklora_glue": (RobertaConfig(**ROBERTA, max_position_embeddings=514), 322_944 + 768 * 769 + 2 * 769),
}
"""Recipe -> a base of the published size, and the published or computed number of trained parameters."""


def paper_rows(recipe: str, folder: Path) -> list[str]:
    """Options that give a recipe two rows of the form that it reads."""
    rows: list[dict[str, Any]] = [
        {"instruction": "a", "outputs": ["b", "c"], "output": "b", "label": i} for i in (0, 1)
    ]
    glue: list[str] = []
    if recipe == "talklora_glue":
        rows, glue = [{"sentence1": "a", "sentence2": "b", "label": i} for i in (0, 1)], ["--config", "data/glue/rte"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*glue, "--data.train", str(folder / "rows.jsonl"), "--data.val", str(folder / "rows.jsonl")]


@pytest.mark.parametrize("recipe", PAPERS)
def test_every_paper_builds_at_its_real_size(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, count = PAPERS[recipe]
    config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    counts: list[int] = []
    inject = FineTuner._inject

    def injected(self: FineTuner, model: PreTrainedModel, *args: Any) -> None:
        inject(self, model, *args)
        assert next(model.parameters()).is_meta
        counts.append(sum(p.numel() for p in trained_tensors(model).values()))

    monkeypatch.setattr(FineTuner, "_inject", injected)
    argv = ["--config", f"recipe/{recipe}", "--model.base.path", str(tmp_path), *paper_rows(recipe, tmp_path)]
    if recipe == "alphalora_mistral_7b":  # spectra need weights; the sum of the counts is the same
        argv += ["--model.adapter.allocation", "published"]
    parsed(*argv, monkeypatch=monkeypatch)
    assert counts[0] == count


@pytest.mark.parametrize("recipe", PAPERS)
def test_every_paper_has_a_sibling_that_is_small(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model(tmp_path, hidden_size=32, num_hidden_layers=4, max_position_embeddings=600)
    argv = ["--config", f"recipe/{recipe}", *paper_rows(recipe, tmp_path), "--config", "recipe/smollm2"]
    cli = parsed_cli(*argv, "--model.base.path", base.path, monkeypatch=monkeypatch)
    assert (cli.trainer.max_steps, cli.trainer.accumulate_grad_batches) == (20, 1)
    assert cli.model.gradient_checkpointing == "off"


@pytest.mark.parametrize("name", talklora_pl.methods())
def test_a_method_is_the_same_on_the_command_line_and_in_python(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option of a default part stays where the method has another part."""
    for step in ("instantiate_classes", "after_instantiate_classes"):
        monkeypatch.setattr(CLI, step, lambda self: None)
    argv = ["--config", f"method/{name}", "--data.train", "x.jsonl", "--model.base.path", str(tmp_path)]
    cli = parsed_cli(*argv, monkeypatch=monkeypatch)
    asked = cli.parser.instantiate_classes(cli.config).fit.model.adapter_config
    assert asked == talklora_pl.method(name)


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
