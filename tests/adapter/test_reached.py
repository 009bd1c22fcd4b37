"""Linears that a text does not reach: the trial of a weightless copy against the real model's gradients."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from talklora_pl.sites import reached
from talklora_pl.sites.reached import TrialFailed, unreached
from talklora_pl.sites.targets import is_linear

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MOE = {
    **SIZES,
    "moe_intermediate_size": 8,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 1,
}
SSM = {**SIZES, "state_size": 4, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_d_ssm": 16, "mamba_d_head": 8}
SEES = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
TOWER = "model.vision_tower."
# kind, its options, and the beginning or the end of every name that a text does not reach
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": (SIZES, ()),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}, ()),
    "opt": ({**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}, ()),
    "bert": ({**SIZES, "is_decoder": True}, ()),
    "mamba": (SSM, ("dt_proj",)),
    "mamba2": ({**SSM, "num_heads": 4, "n_groups": 1}, ()),
    "lfm2": ({**SIZES, "layer_types": ["conv", "full_attention"]}, ()),
    "jamba": (
        {**SSM, **MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        ("dt_proj",),
    ),
    "falcon_h1": ({**SSM, "mamba_n_heads": 2, "mamba_n_groups": 1}, ()),
    "mixtral": (MOE, ()),
    "qwen2_moe": ({**MOE, "shared_expert_intermediate_size": 8}, ()),
    "qwen3_moe": (MOE, ()),
    "gpt_oss": (MOE, ()),
    "deepseek_v3": (
        {
            **{k: v for k, v in MOE.items() if k != "head_dim"},
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2},
            **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        },
        (),
    ),
    "llama4_text": ({**MOE, "intermediate_size_mlp": 24}, ("router",)),
    "gemma3": ({"text_config": SIZES, "vision_config": SEES, "mm_tokens_per_image": 4}, (TOWER,)),
    "llava": (
        {
            "text_config": {**SIZES, "model_type": "llama"},
            "vision_config": {**SEES, "model_type": "clip_vision_model"},
        },
        (TOWER, "model.multi_modal_projector."),
    ),
    "qwen2_vl": ({"text_config": {**SIZES, **ROPE}, "vision_config": SEES}, ("model.visual.",)),
    "mllama": (
        {
            "text_config": {**SIZES, "cross_attention_layers": [1]},
            "vision_config": {**SEES, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
        },
        ("model.language_model.layers.1.", "model.vision_model.", "model.multi_modal_projector"),
    ),
}


def build(kind: str) -> Any:
    config = AutoConfig.for_model(kind, **FAMILIES[kind][0])
    torch.manual_seed(0)
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText.from_config(config).eval()
    return AutoModelForCausalLM.from_config(config).eval()


def without_gradient(model: nn.Module) -> set[str]:
    """The same by the real model: a number added to the output of every Linear, and who has a gradient after a loss."""
    marks = {}
    for name, module in model.named_modules():
        if is_linear(module):
            marks[name] = mark = torch.zeros((), requires_grad=True)
            module.register_forward_hook(lambda m, x, y, mark=mark: y + mark if isinstance(y, torch.Tensor) else y)
    ids = torch.arange(2, 22).reshape(2, 10)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
    return {n for n, mark in marks.items() if mark.grad is None}


@pytest.mark.parametrize("kind", FAMILIES)
def test_is_what_the_real_model_gives_no_gradient(kind: str) -> None:
    model = build(kind)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    started = time.perf_counter()
    got = unreached(model)
    assert time.perf_counter() - started < 2
    ends = FAMILIES[kind][1]
    assert all(n.startswith(ends) or n.endswith(ends) for n in got)
    assert all(any(n.startswith(e) or n.endswith(e) for n in got) for e in ends)
    assert got == {n for n in without_gradient(model) if not re.search(r"experts\.\d", n)}
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_an_expert_that_was_not_chosen_counts_as_reached() -> None:
    """Models whose experts are modules of their own, as most code from the hub has them."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[2](x)

    class Sparse(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = Experts()
                layer.unused = nn.Linear(16, 16)

    assert unreached(Sparse(transformers.LlamaConfig(**SIZES))) == {f"model.layers.{i}.unused" for i in (0, 1)}


def test_full_size_models_take_no_memory_and_little_time() -> None:
    import resource

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            transformers.MixtralConfig(num_hidden_layers=8)  # 8 x 1.4e9 weights, 45 GB
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    assert unreached(model) == frozenset()
    assert time.perf_counter() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_the_trial_leaves_the_random_state_alone_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("llama"), []
    reached._known.clear()
    real = reached._try
    monkeypatch.setattr(reached, "_try", lambda *a: calls.append(a) or real(*a))
    state = torch.get_rng_state()
    assert unreached(model) == unreached(build("llama")) == frozenset()
    assert len(calls) == 1
    torch.manual_seed(3)
    before = torch.rand(2)
    torch.manual_seed(3)
    reached._known.clear()
    unreached(model)
    assert torch.equal(torch.rand(2), before)
    assert len(state) == len(torch.get_rng_state())


def test_it_is_made_on_the_cpu_wherever_the_model_is_built() -> None:
    """Lightning builds a model with the GPU as the default device."""
    model = build("llama")
    reached._known.clear()
    with torch.device("meta"):
        assert unreached(model) == frozenset()


def test_of_other_modules_nothing_is_known() -> None:
    assert unreached(nn.Sequential(nn.Linear(2, 2))) == frozenset()


def test_a_model_that_cannot_be_tried_says_why() -> None:
    config = transformers.RwkvConfig(vocab_size=512, hidden_size=256, num_hidden_layers=2)  # rescales its weights
    with pytest.raises(TrialFailed, match="RuntimeError: "):
        unreached(transformers.RwkvForCausalLM(config))
