"""What the loader reports is acted upon: a new head is trained and named, a body with holes is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from talklora_pl.base.loading import grow_vocabulary, grown, head_parameters, new_modules, settle, vocabulary
from talklora_pl.errors import UserError
from tests.base.test_description import tiny

Notices = list[str]


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> Notices:
    said: Notices = []
    for name in ("rank_zero_info", "rank_zero_warn"):
        monkeypatch.setattr(f"talklora_pl.base.loading.{name}", said.append)
    return said


def load(folder: Path, auto: Any, **config: Any) -> Any:
    model, report = auto.from_pretrained(
        folder,
        config=AutoConfig.from_pretrained(folder, **config),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    settle(model.requires_grad_(False), "BASE", report, auto is AutoModelForSequenceClassification)
    return model


def save(folder: Path, auto: Any, config: Any) -> None:
    auto.from_config(config).save_pretrained(folder)


def edit(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "auto", "new"),
    [
        ("bert", AutoModelForMaskedLM, ["bert.pooler.dense", "classifier"]),
        ("roberta", AutoModelForMaskedLM, ["classifier.dense", "classifier.out_proj"]),
        (
            "xlm-roberta",
            AutoModelForMaskedLM,
            ["classifier.dense", "classifier.out_proj"],
        ),  # registered before the body
        ("nomic_bert", AutoModelForMaskedLM, ["nomic_bert.pooler.dense", "classifier"]),  # pooler before the layers
        ("albert", AutoModelForMaskedLM, ["albert.pooler", "classifier"]),
        ("llama", AutoModelForCausalLM, ["score"]),
        ("gpt2", AutoModelForCausalLM, ["score"]),
        ("bert", AutoModelForSequenceClassification, []),
    ],
)
def test_a_new_head_is_named_and_trainable(
    kind: str, auto: Any, new: list[str], tmp_path: Path, notices: Notices
) -> None:
    save(tmp_path, auto, tiny(kind, bos_token_id=0, eos_token_id=1))
    model = load(tmp_path, AutoModelForSequenceClassification)
    assert new_modules(model) == new
    assert all(p.requires_grad == any(n.startswith(f"{m}.") for m in new) for n, p in model.named_parameters())
    assert [all(m in said for m in new) for said in notices] == [True] * bool(new)


def test_another_number_of_classes_is_a_new_head(tmp_path: Path, notices: Notices) -> None:
    save(tmp_path, AutoModelForSequenceClassification, tiny("llama", num_labels=3))
    assert new_modules(load(tmp_path, AutoModelForSequenceClassification)) == []
    model = load(tmp_path, AutoModelForSequenceClassification, num_labels=2)
    assert new_modules(model) == ["score"] and model.score.weight.shape[0] == 2
    assert "BASE (score.weight) has 3 classes, this run 2. The head is new" in notices[0]


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("lost", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_body_with_holes_is_refused(auto: Any, lost: str, tmp_path: Path) -> None:
    save(tmp_path, AutoModelForCausalLM, tiny("llama"))
    edit(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != lost})
    with pytest.raises(UserError, match=rf"'BASE' lack {lost}\. They would begin at random"):
        load(tmp_path, auto)


def test_a_language_model_without_its_head_is_refused(tmp_path: Path) -> None:
    save(tmp_path, AutoModelForSequenceClassification, tiny("llama"))
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        load(tmp_path, AutoModelForCausalLM)


def test_an_embedding_of_another_size_than_the_configuration_says(tmp_path: Path) -> None:
    save(tmp_path, AutoModelForCausalLM, tiny("llama"))
    with pytest.raises(UserError, match=r"hold model.embed_tokens.weight as \[64, 16\], .* \[70, 16\] \(and 1 more\)"):
        load(tmp_path, AutoModelForCausalLM, vocab_size=70)


def test_weights_without_a_place_are_said(tmp_path: Path, notices: Notices) -> None:
    save(tmp_path, AutoModelForCausalLM, tiny("llama", num_hidden_layers=2))
    load(tmp_path, AutoModelForCausalLM, num_hidden_layers=1)
    assert "BASE holds 9 tensors that LlamaForCausalLM has no place for, such as model.layers.1." in notices[0]
    notices.clear()
    load(tmp_path, AutoModelForCausalLM)
    assert notices == []


def test_a_numbered_head_is_behind_the_layers() -> None:
    model = AutoModelForSequenceClassification.from_config(tiny("bert"))
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 2))
    assert {n.split(".")[0] for n in head_parameters(model)} == {"bert", "classifier"}
    assert [n for n in head_parameters(model) if n.startswith("bert")] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    ]


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt2", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_the_old_ones_stay(kind: str, tied: bool) -> None:
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    config = tiny(kind, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=tied)
    model = auto.from_config(config).eval().requires_grad_(False)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    old = model.get_input_embeddings().weight.clone()
    grow_vocabulary(model, 70)
    after = model(ids).logits
    torch.testing.assert_close(after[..., :64], before)
    torch.testing.assert_close(after[..., 64:], before.mean(-1, keepdim=True).expand(1, 8, 6))
    assert torch.equal(model.get_input_embeddings().weight, grown(old, 70))
    assert model.config.vocab_size == 70
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(vocabulary(model))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_it_grows_without_weights_too() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("llama"))
    grow_vocabulary(model, 70)
    assert model.get_output_embeddings().weight.shape[0] == 70
