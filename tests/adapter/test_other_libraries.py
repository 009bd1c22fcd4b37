"""Bases as other libraries leave them: Linears of other classes, and PEFT before or after us."""

from __future__ import annotations

import importlib
from abc import ABC
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from talklora_pl import AdapterConfig, UserError, inject, load_adapter, remove_adapter, save_adapter
from talklora_pl.adapter.host import Adapted
from tests.conftest import tiny_llama

IDS = torch.arange(12).reshape(2, 6)


class Abstract(ABC):  # noqa: B024
    """A parent that is of another layout than Module."""


class Meta(type):
    """Of classes that are made in a way of their own."""


class Mixin:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "kept"


class AbstractFirst(Abstract, nn.Linear):
    pass


class MixinFirst(Mixin, nn.Linear):
    pass


class OtherMeta(nn.Linear, metaclass=Meta):
    pass


class Slots(nn.Linear):
    __slots__ = ("extra",)


class Final(nn.Linear):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("Final cannot be derived from")


def base(cls: type[nn.Linear] = nn.Linear, which: str = "q_proj") -> Any:
    """A tiny Llama, some of whose Linears are of the class ``cls``."""
    model = tiny_llama().eval()
    for layer in model.model.layers:
        old = getattr(layer.self_attn, which)
        new = cls(old.in_features, old.out_features, bias=False)
        new.weight = old.weight
        setattr(layer.self_attn, which, new)
    return model


@pytest.mark.parametrize("cls", [AbstractFirst, MixinFirst, OtherMeta, Slots])
def test_a_linear_of_another_class_is_adapted(cls: type[nn.Linear]) -> None:
    outs = []
    for model in (base(), base(cls)):
        torch.manual_seed(0)
        adapter = inject(model, AdapterConfig(rank=8))
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(torch.sin(torch.arange(p.numel())).view_as(p))
        outs.append(model(IDS).logits)
    torch.testing.assert_close(*outs)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, cls) and isinstance(layer, Adapted)
    remove_adapter(model)
    assert type(layer) is cls
    torch.testing.assert_close(model(IDS).logits, base()(IDS).logits)


def state_of(model: Any) -> list[Any]:
    """Everything that an injection changes in a model."""
    modules = [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()]
    return [modules, [(n, p.requires_grad) for n, p in model.named_parameters()]]


def test_a_class_that_cannot_be_exchanged_is_named_and_the_model_is_as_it_was() -> None:
    model = base(Final, "v_proj")  # after q_proj, which could be adapted
    before = state_of(model)
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.v_proj' is a .*\.Final, a class that .* exclude"):
        inject(model, AdapterConfig(rank=8))
    assert state_of(model) == before
    inject(model, AdapterConfig(rank=8, exclude=["v_proj"]))


def test_whatever_fails_while_it_is_attached_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    where: Any = importlib.import_module("talklora_pl.adapter.inject")
    model, calls, attach = base(), [], where.attach

    def fails(module: nn.Module, *args: Any) -> None:
        calls.append(module)
        if len(calls) == 3:
            raise RuntimeError("no more")
        attach(module, *args)

    before = state_of(model)
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="no more"):
        m.setattr(where, "attach", fails)
        inject(model, AdapterConfig(rank=8))
    assert state_of(model) == before

    inject(model, AdapterConfig(rank=8), "one")
    before, calls[:] = state_of(model), []
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="no more"):
        m.setattr(where, "attach", fails)
        inject(model, AdapterConfig(rank=4), "two")
    assert state_of(model) == before and list(model.talklora) == ["one"]


LORA = LoraConfig(target_modules=["q_proj"])


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"], "all-linear"])
def test_a_base_with_an_adapter_of_peft_is_refused(targets: Any, tmp_path: Path) -> None:
    ours = tiny_llama()
    inject(ours, AdapterConfig(rank=8))
    save_adapter(ours, tmp_path / "ours")
    by_transformers = tiny_llama()
    by_transformers.add_adapter(LORA)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for model in (get_peft_model(tiny_llama(), LORA), by_transformers, get_peft_model(tiny_llama(), prompts)):
        before = state_of(model)
        with pytest.raises(UserError, match=r"carries an adapter of PEFT .*merge_and_unload"):
            inject(model, AdapterConfig(rank=8, targets=targets))
        with pytest.raises(UserError):
            load_adapter(model, tmp_path / "ours")
        assert state_of(model) == before
    for leave in ("merge_and_unload", "unload"):
        inject(getattr(get_peft_model(tiny_llama(), LORA), leave)(), AdapterConfig(rank=8, targets=targets))


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r"model\.layers.*q_proj"])
def test_peft_on_our_modules_is_refused_before_it_changes_them(targets: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    inject(model, AdapterConfig(rank=8, targets=["q_proj"]))
    modules = [(n, type(m)) for n, m in model.named_modules()]
    grads = [p.requires_grad for p in model.parameters()]
    for put in (lambda c: get_peft_model(model, c), model.add_adapter):
        with pytest.raises(UserError, match=r"Linear has an adapter of talklora_pl, and PEFT cannot .*remove_adapter"):
            put(LoraConfig(target_modules=targets))
        assert [(n, type(m)) for n, m in model.named_modules()] == modules
        assert [p.requires_grad for p in model.parameters()] == grads
    save_adapter(model, tmp_path / "saved")


def test_peft_on_other_modules_works_and_has_to_go_before_ours_is_saved(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    adapter = inject(model, AdapterConfig(rank=8, targets=["q_proj"]))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    want = model(IDS).logits
    peft = get_peft_model(model, LoraConfig(target_modules=["o_proj"]))
    assert torch.equal(peft(IDS).logits, want)  # its B is zero
    peft(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in peft.named_parameters() if ".lora_" in n)
    with pytest.raises(UserError, match=r"carries an adapter of PEFT .*unload"):
        save_adapter(model, tmp_path / "ours")
    peft.unload()
    save_adapter(model, tmp_path / "ours")
    other = tiny_llama().eval()
    load_adapter(other, tmp_path / "ours")
    assert torch.equal(other(IDS).logits, want)
