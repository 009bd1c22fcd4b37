"""Checkpointing changes no gradient, and what is kept for the backward pass is as the mode says."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from talklora_pl.adapter import inject
from talklora_pl.errors import UserError
from talklora_pl.memory import checkpointing
from talklora_pl.memory.checkpointing import CAN_SELECT, MODES, checkpoint_layers, mode_of
from talklora_pl.memory.live import LiveBytes
from tests.conftest import tiny_llama
from tests.methods.test_configs import config_of
from tests.methods.test_families import build, sized

IDS = torch.arange(2, 26).reshape(2, 12)
selects = pytest.mark.skipif(not CAN_SELECT, reason="this torch has no op_output for policies")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # dropout
    model.zero_grad()
    model.train()(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["talklora", "mola", "graphlora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt"])
def test_gradients_are_the_same(kind: str, method: str) -> None:
    if method == "graphlora" and kind != "llama":
        method = "talklora_gnn"
    found = []
    for mode in MODES:
        model = build(kind).double()
        config = sized(method, ["mlp"] if method == "graphlora" else "all-linear", dropout_input=0.1)
        adapter = inject(model, config).double()
        generator = torch.Generator().manual_seed(1)
        for p in adapter.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        checkpoint_layers(model, mode)  # type: ignore[arg-type]
        found.append(gradients(model))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-10, atol=1e-10)


@selects
def test_a_layer_that_is_copied_before_it_is_added_to() -> None:
    """A hooked layer is called as it is: the copy of its output is made again, and so is the addition."""
    found = []
    for mode in ("off", "selective"):
        model = build("llama").double()
        adapter = inject(model, sized("talklora", "all-linear")).double()
        for p in adapter.parameters():
            p.data.fill_(0.1)
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda module, args, out: out * 1)
        checkpoint_layers(model, mode)  # type: ignore[arg-type]
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-10)


@selects
def test_memory_of_selective_is_in_between() -> None:
    kept = {}
    for mode in ("off", "selective", "full"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)).requires_grad_(False).train()
        inject(model, config_of("talklora"))
        checkpoint_layers(model, mode)  # type: ignore[arg-type]
        gc.collect()
        with LiveBytes() as live:
            out = model(input_ids=torch.arange(32).repeat(2, 16) % 30, use_cache=False).logits
            kept[mode] = live.now
        out.sum().backward()
    assert kept["full"] < 0.1 * kept["off"], kept
    assert kept["full"] * 3 < kept["selective"] < 0.7 * kept["off"], kept


def test_nothing_is_computed_a_third_time() -> None:
    model = tiny_llama()
    adapter = inject(model, replace(config_of("graphlora"), balance=[]))
    blocks: list[Any] = [m for m in adapter.modules() if hasattr(m, "recompute")]
    for mode, again in (("full", False), ("off", True)):
        checkpoint_layers(model, mode)  # type: ignore[arg-type]
        assert blocks and all(block.recompute == again for block in blocks)


def test_what_the_option_means() -> None:
    assert [mode_of(value) for value in (False, True, "off", "full")] == ["off", "full", "off", "full"]
    with pytest.raises(UserError, match="'half' is none of off, full and selective"):
        mode_of("half")


@selects
def test_the_option_of_a_torch_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode_of("selective") == "selective"
    monkeypatch.setattr(checkpointing, "MODES", ("off", "full"))
    with pytest.raises(UserError, match=r"selective needs torch 2\.13 or newer; this is"):
        mode_of("selective")
