"""A base with a padded vocabulary is the same base; old marks are still compared; what cannot be read has none."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PhiConfig

from talklora_pl import AdapterConfig, inject, load_adapter, save_adapter
from talklora_pl.adapter.fingerprint import agree, fingerprint
from talklora_pl.errors import UserError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 1}
CONFIGS = {
    "untied": LlamaConfig(vocab_size=50, **SIZES),
    "tied": LlamaConfig(vocab_size=50, **SIZES, tie_word_embeddings=True),
    "biased": PhiConfig(vocab_size=50, **SIZES, **IDS),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, **IDS),
}


def make(kind: str = "untied", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("rows", [64, 51, 40])
def test_a_padded_vocabulary_is_the_same_base(kind: str, rows: int) -> None:
    model = make(kind)
    before = fingerprint(model) or ""
    model.resize_token_embeddings(rows, mean_resizing=False)
    assert agree(fingerprint(model) or "", before)
    model.config.vocab_size = 50
    assert not agree(fingerprint(make(kind, seed=1)) or "", before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_embeddings_are_another_base(kind: str) -> None:
    model = make(kind)
    before = fingerprint(model) or ""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.02)
    assert not agree(fingerprint(model) or "", before)


def test_an_adapter_goes_to_a_base_with_a_padded_vocabulary(tmp_path: Path) -> None:
    model = make()
    inject(model, AdapterConfig(rank=4, num_experts=2))
    save_adapter(model, tmp_path / "a")
    ids = torch.arange(6)[None]
    padded = make()
    padded.resize_token_embeddings(64, mean_resizing=False)
    load_adapter(padded, tmp_path / "a")
    assert torch.equal(padded(ids).logits[..., :50], model(ids).logits)


def old_fingerprint(model: nn.Module) -> str:
    """As version 0.1 wrote it."""
    named = dict(sorted(model.named_parameters()))
    names = hashlib.sha256("\n".join(f"{n} {list(p.shape)}" for n, p in named.items()).encode()).hexdigest()[:16]
    values = []
    for p in named.values():
        count = min(1024 // len(named), p.numel())
        values += [p.detach().reshape(-1)[(2 * i + 1) * p.numel() // (2 * count)] for i in range(count)]
    numbers = torch.stack(values).to(torch.bfloat16).view(torch.int16).numpy().astype("<i2")
    return f"{names}:{base64.b64encode(numbers.tobytes()).decode()}"


@pytest.mark.parametrize("kind", CONFIGS)
def test_fingerprints_of_earlier_versions(kind: str, tmp_path: Path) -> None:
    old = old_fingerprint(make(kind))
    assert fingerprint(make(kind), like=old) == old
    assert not agree(fingerprint(make(kind, seed=1), like=old) or "", old)
    assert not agree(fingerprint(make(kind)) or "", old)  # of two versions: not to be compared
    targets = "all-linear"
    model = make(kind)
    inject(model, AdapterConfig(rank=4, num_experts=2, targets=targets))
    save_adapter(model, tmp_path / "a", fingerprint=old)
    load_adapter(make(kind), tmp_path / "a")
    with pytest.raises(UserError, match="other weights"):
        load_adapter(make(kind, seed=1), tmp_path / "a")


class Packed(torch.Tensor):
    """Stands for the tensors of quantisation libraries: seen as a matrix, and refuses all but its own operations."""

    @staticmethod
    def __new__(cls, like: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, like: torch.Tensor) -> None:
        self.like = like

    @classmethod
    def __torch_function__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is nn.functional.linear:
            return f(args[0], args[1].like, *args[2:])
        return super().__torch_function__(f, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is torch.ops.aten.detach.default:
            return Packed(args[0].like)
        raise NotImplementedError(f)  # a packed weight takes part in nothing else


def packed() -> Any:
    model = make()
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Packed(module.weight.detach()), requires_grad=False)
    return model


def test_tensors_that_cannot_be_read_have_no_fingerprint(tmp_path: Path) -> None:
    model, ids = packed(), torch.arange(6)[None]
    assert fingerprint(model) is None
    inject(model, AdapterConfig(rank=4, num_experts=2))
    model(ids, labels=ids).loss.backward()
    save_adapter(model, tmp_path / "a")
    other = packed()
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(ids).logits, model(ids).logits)
