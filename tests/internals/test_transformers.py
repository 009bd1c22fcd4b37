"""What transformers and accelerate do beside their documented interface."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
)

from talklora_pl.internals import transformers as internals


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))


def test_an_asked_attention_is_used(model: LlamaForCausalLM) -> None:
    config = AutoConfig.for_model("llama", hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    internals.take_attention(config, LlamaConfig())  # names none
    assert internals.attention_of(LlamaForCausalLM(config).config) == "sdpa"
    internals.take_attention(config, LlamaConfig(attn_implementation="eager"))
    assert LlamaForCausalLM(config).model.config._attn_implementation == "eager"


def test_attention_of_a_config_can_be_made_eager() -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    internals.use_eager_attention(config)
    assert LlamaForCausalLM(config).model.config._attn_implementation == "eager"


def test_an_auto_class_tells_whether_it_has_a_model() -> None:
    assert internals.has_model(AutoModelForCausalLM, LlamaConfig())
    assert not internals.has_model(AutoModelForCausalLM, ViTConfig())


def test_fused_experts_apply_their_gate_between_the_projections() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "vocab_size": 8}
    mixtral = MixtralForCausalLM(
        MixtralConfig(num_hidden_layers=1, num_key_value_heads=1, num_local_experts=2, **sizes)
    )
    experts = mixtral.model.layers[0].mlp.experts
    h_SG = torch.randn(3, 12)
    gate_SH, up_SH = h_SG.chunk(2, dim=-1)
    assert torch.allclose(internals.gate(experts, h_SG), nn.functional.silu(gate_SH) * up_SH)


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


def test_known_rows_are_not_looked_for_and_make_the_same_mask() -> None:
    """A Llama without a mask: alone it looks at the positions; told what the rows are, it computes the same."""
    from talklora_pl.internals.transformers import rows_are_packed

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9, num_attention_heads=2)
    ).eval()
    ids = torch.arange(6).unsqueeze(0)
    for positions, packed in (([0, 1, 2, 0, 1, 2], True), ([0, 1, 2, 3, 4, 5], False)):
        inputs = {"input_ids": ids, "position_ids": torch.tensor([positions])}
        looked = model(**inputs).logits
        token = rows_are_packed.set(packed)
        try:
            told = model(**inputs).logits
        finally:
            rows_are_packed.reset(token)
        assert torch.equal(looked, told)
    assert not torch.equal(looked, model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])).logits)
