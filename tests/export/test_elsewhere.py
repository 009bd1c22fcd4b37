"""Folders as other programs and other places meet them: relative paths, ``architectures``, further training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from talklora_pl import AdapterConfig, export_adapter, save_adapter
from talklora_pl.adapter.metadata import read_metadata
from tests.export import models


@pytest.mark.parametrize("path", ["models/base", "./models/base", "base", "../base"])
@pytest.mark.parametrize("moved_before_saving", [False, True])
def test_a_relative_base_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, moved_before_saving: bool
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    models.save_base(Path(path), "llama")
    model = models.load(Path(path))
    models.train(model, AdapterConfig(rank=8))
    want = models.logits(model)
    if moved_before_saving:
        monkeypatch.chdir(elsewhere)
    export_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "saved")
    monkeypatch.chdir(elsewhere)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert torch.equal(models.logits(loaded), want)
    for folder in ("adapter", "saved"):
        assert read_metadata(tmp_path / folder).base.name_or_path == str((here / path).resolve())


def test_a_path_that_is_given_for_the_folder_is_stored_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models.save_base(Path("base"), "llama")
    model = models.load(tmp_path / "base")
    models.train(model, AdapterConfig(rank=8))
    for given, stored in (("base", str(tmp_path / "base")), ("owner/name", "owner/name"), ("", "")):
        save_adapter(model, "saved", name_or_path=given)
        assert read_metadata("saved").base.name_or_path == stored


def test_a_hub_name_stays_though_a_folder_without_a_model_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.load(models.save_base(tmp_path / "base", "llama"))
    model.config.name_or_path = "owner/name"
    Path("owner/name").mkdir(parents=True)
    models.train(model, AdapterConfig(rank=8))
    save_adapter(model, "saved")
    assert read_metadata("saved").base.name_or_path == "owner/name"


@pytest.mark.parametrize("family", ["llama", "llama_classifier"])
def test_loaders_that_look_up_the_class_in_architectures(tmp_path: Path, family: str) -> None:
    """As TRL does: a class of transformers of that name where there is one, else the auto class."""
    base = models.save_base(tmp_path / "base", family)
    model = models.load(base, family)
    models.train(model, AdapterConfig(rank=8, modules_to_save=["score"] if family == "llama_classifier" else []))
    export_adapter(model, tmp_path / "adapter", tokenizer=AutoTokenizer.from_pretrained(base))
    [named] = json.loads((tmp_path / "adapter" / "config.json").read_text())["architectures"]
    auto: Any = AutoModelForSequenceClassification if family == "llama_classifier" else AutoModelForCausalLM
    assert f"class {named}(" in (tmp_path / "adapter" / "modeling_talklora.py").read_text()
    loader: Any = getattr(transformers, named, auto)
    loaded = loader.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert type(loaded) is type(model) and loaded.config.architectures == [type(model).__name__]
    assert torch.equal(models.logits(loaded), models.logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())

    further = auto.from_pretrained(tmp_path / "adapter", trust_remote_code=True, trainable=True)
    trained = {n for n, p in further.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


def test_what_is_said_without_the_flag_is_in_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.load(models.save_base(tmp_path / "base", "llama"))
    models.train(model, AdapterConfig(rank=8))
    export_adapter(model, "my-adapter")
    with pytest.raises(OSError, match="pass trust_remote_code=True") as error:
        AutoModelForCausalLM.from_pretrained("my-adapter")
    page = Path(__file__).parents[2] / "docs" / "export.md"
    assert f"{type(error.value).__name__}: {error.value}" in page.read_text(encoding="utf-8")
