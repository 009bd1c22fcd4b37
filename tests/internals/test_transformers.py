"""What transformers and accelerate do beside their documented interface."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from talklora_pl.internals import transformers as internals


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))


def test_an_asked_attention_is_used(model: LlamaForCausalLM) -> None:
    config = AutoConfig.for_model("llama", hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    internals.take_attention(config, LlamaConfig())  # names none
    assert LlamaForCausalLM(config).model.config._attn_implementation == "sdpa"
    internals.take_attention(config, LlamaConfig(attn_implementation="eager"))
    assert LlamaForCausalLM(config).model.config._attn_implementation == "eager"


def test_a_model_names_its_decoder_layers(model: LlamaForCausalLM) -> None:
    assert internals.whole_classes(model) == {"LlamaDecoderLayer"}
    assert internals.whole_classes(nn.Linear(1, 1)) == set()


def test_only_what_is_not_marked_is_initialised(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        model.lm_head.weight.fill_(7)
        layer.q_proj.weight.fill_(7)
    layer.k_proj.to("meta")
    internals.mark_initialised(model)
    layer.k_proj.weight = nn.Parameter(torch.full((8, 8), 7.0))
    for module in (model.lm_head, layer.q_proj, layer.k_proj):
        internals.initialise(model, module)
    assert (model.lm_head.weight == 7).all() and (layer.q_proj.weight == 7).all()
    assert 0 < layer.k_proj.weight.std() < 0.1


def test_a_module_of_another_class_keeps_its_hook() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = nn.Linear(2, 2)
    assert not internals.has_accelerate_hook(module)
    add_hook_to_module(module, AlignDevicesHook("cpu"))
    assert internals.has_accelerate_hook(module)
    before = module(torch.ones(2))
    module.__class__ = Doubled
    assert torch.equal(module(torch.ones(2)), before)  # the hook still calls the old one
    internals.renew_accelerate_hook(module)
    assert torch.equal(module(torch.ones(2)), 2 * before)
