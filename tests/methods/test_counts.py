"""Trainable parameters of the papers' models, counted on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from talklora_pl.adapter import AdapterConfig, inject
from tests.conftest import LLAMA3_8B
from tests.methods.test_configs import config_of

LLAMA3_8B_CONFIG = LlamaConfig(**LLAMA3_8B)
LLAMA2_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
MISTRAL_7B = MistralConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)


def count(config: Any, options: AdapterConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = inject(model, options)
    return sum(p.numel() for p in adapter.parameters())


def changed(method: str, **options: Any) -> AdapterConfig:
    return AdapterConfig.from_dict({**config_of(method).to_dict(), **options})


def test_graphlora() -> None:
    """Their count has two numbers of the losses per layer: λ and σ."""
    assert count(LLAMA3_8B_CONFIG, config_of("graphlora")) == 64_622_656
    wide = config_of("graphlora").to_dict()["communication"] | {"width": 256}
    assert count(LLAMA3_8B_CONFIG, changed("graphlora", communication=wide)) == 101_326_912


@pytest.mark.parametrize(
    "method, options, total",
    [
        ("mixlora", {}, 121_110_528),
        ("mixlora", {"plain": None, "expert_rank": 16, "alpha": 32, "balance": []}, 227_540_992),  # MING-MoE
        # LoRAMoE as configured in GMoE: one dense router per FFN
        ("mixlora", {"plain": None, "router": "softmax", "balance": []}, 114_294_784),
        ("mixlora", {"plain": None, "router": "softmax", "balance": [], "expert_rank": 4}, 57_671_680),
    ],
)
def test_whole_ffn_methods(method: str, options: dict[str, Any], total: int) -> None:
    assert count(LLAMA3_8B_CONFIG, changed(method, **options)) == total


@pytest.mark.parametrize("config, total", [(LLAMA2_7B, 105_635_840), (MISTRAL_7B, 111_083_520)])
def test_mola_whatever_the_shape(config: Any, total: int) -> None:
    assert count(config, changed("mola", allocation="uniform")) == total
