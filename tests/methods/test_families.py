"""Model families, each as a tiny random model: decoders of many styles, encoders with a head that is trained along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from talklora_pl import UserError
from talklora_pl.adapter import AdapterConfig, RoutingCollector, inject
from talklora_pl.adapter.io import load_adapter, save_adapter
from talklora_pl.sites.targets import find_targets
from tests.data.tiny import SIZES
from tests.methods.test_configs import config_of

GATED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
DECODERS: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (GATED, 14),
    "mistral": (GATED, 14),
    "qwen2": ({**SIZES, "num_key_value_heads": 1}, 14),
    "qwen3": (GATED, 14),
    "gemma": (GATED, 14),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24}, 8),
    "gpt_neox": (SIZES, 8),
    "phi": (SIZES, 12),
    "opt": ({**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}, 12),
}
ENCODERS = {"bert": 12, "roberta": 12}
IDS = torch.arange(2, 14).reshape(2, 6)


def build(kind: str) -> PreTrainedModel:
    sizes = DECODERS[kind][0] if kind in DECODERS else SIZES
    config = AutoConfig.for_model(
        kind, vocab_size=32, max_position_embeddings=32, pad_token_id=1, bos_token_id=0, eos_token_id=0, **sizes
    )
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind in DECODERS else AutoModelForSequenceClassification
    return auto.from_config(config).eval()


def sized(method: str, targets: Any, **options: Any) -> AdapterConfig:
    data = config_of(method).to_dict()
    return AdapterConfig.from_dict({**data, "targets": targets, "dropout_input": 0.0, **options})


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("method", ["talklora", "mola"])
def test_all_linear(kind: str, method: str) -> None:
    model = build(kind)
    base = model(input_ids=IDS).logits
    assert len(find_targets(model, "all-linear")) == (DECODERS[kind][1] if kind in DECODERS else ENCODERS[kind])
    adapter = inject(model, sized(method, "all-linear"))
    torch.testing.assert_close(model(input_ids=IDS).logits, base)
    with RoutingCollector(model, torch.ones(IDS.shape)) as collector:
        model.train()(input_ids=IDS).logits.sum().backward()
    assert {r.layer for r in collector.records} == set(adapter.routed_layers())
    assert all(len(r.mask_T) == IDS.numel() for r in collector.records)
    assert [n for n, p in adapter.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("method", ["graphlora", "mixlora"])
def test_whole_ffn_where_it_is_gated(kind: str, method: str) -> None:
    model = build(kind)
    base = model(input_ids=IDS).logits
    config = sized(method, ["mlp"])
    if kind in ("gpt2", "gpt_neox", "phi", "opt"):
        with pytest.raises(UserError, match="it has none" if kind == "opt" else "does not compute down"):
            inject(model, config)
        torch.testing.assert_close(model(input_ids=IDS).logits, base)
        return
    adapter = inject(model, config)
    torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=1e-4, atol=1e-5)
    model.train()(input_ids=IDS).logits.sum().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None and not n.startswith("balance")] == []


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_head_is_trained_and_saved_along(kind: str, tmp_path: Any) -> None:
    model = build(kind)
    inject(model, sized("talklora", "all-linear", modules_to_save=["classifier"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    save_adapter(model, tmp_path)
    again = build(kind)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
