"""Bases as other libraries leave them: Linears of other classes, and PEFT before or after us."""

from __future__ import annotations

import importlib
from abc import ABC
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from talklora_pl import AdapterConfig, UserError, export_adapter, inject, load_adapter, remove_adapter, save_adapter
from talklora_pl.adapter.host import Adapted
from talklora_pl.adapter.metadata import read_metadata
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


def add_adapter(model: Any, config: LoraConfig) -> Any:
    """By transformers, which takes no PEFT that is older than it likes."""
    try:
        model.add_adapter(config)
    except ValueError as e:
        if "version of PEFT" not in str(e):
            raise
        pytest.skip(str(e))
    return model


PROMPTS = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize("put, config", [(get_peft_model, LORA), (add_adapter, LORA), (get_peft_model, PROMPTS)])
@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"], "all-linear"])
def test_a_base_with_an_adapter_of_peft_is_refused(targets: Any, put: Any, config: Any, tmp_path: Path) -> None:
    ours = tiny_llama()
    inject(ours, AdapterConfig(rank=8))
    save_adapter(ours, tmp_path / "ours")
    model = put(tiny_llama(), config)
    before = state_of(model)
    with pytest.raises(UserError, match=r"carries an adapter of PEFT .*merge_and_unload"):
        inject(model, AdapterConfig(rank=8, targets=targets))
    with pytest.raises(UserError):
        load_adapter(model, tmp_path / "ours")
    assert state_of(model) == before


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"], "all-linear"])
def test_a_base_that_peft_has_left_is_adapted(targets: Any) -> None:
    for leave in ("merge_and_unload", "unload"):
        inject(getattr(get_peft_model(tiny_llama(), LORA), leave)(), AdapterConfig(rank=8, targets=targets))


@pytest.mark.parametrize("put", [get_peft_model, add_adapter])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r"model\.layers.*q_proj"])
def test_peft_on_our_modules_is_refused_before_it_changes_them(targets: Any, put: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    inject(model, AdapterConfig(rank=8, targets=["q_proj"]))
    modules = [(n, type(m)) for n, m in model.named_modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=r"Linear has an adapter of talklora_pl, and PEFT cannot .*remove_adapter"):
        put(model, LoraConfig(target_modules=targets))
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


class Packed(torch.Tensor):
    """Int8 rows and their scales that show themselves as a float matrix and can only be multiplied, as torchao's."""

    @staticmethod
    def __new__(cls, rows: Tensor, scales: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=torch.float32)

    def __init__(self, rows: Tensor, scales: Tensor) -> None:
        self.rows, self.scales = rows, scales

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, w, *bias = args
            return nn.functional.linear(x, w.rows.float() * w.scales, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Packed(args[0].rows, args[0].scales)
        raise NotImplementedError(function)


def packed() -> Any:
    model = tiny_llama().eval()
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            w = module.weight.detach()
            scales = w.abs().amax(1, keepdim=True) / 127
            module.weight = nn.Parameter(Packed((w / scales).round().to(torch.int8), scales), requires_grad=False)
    return model


def test_weights_that_cannot_be_read_as_numbers_are_trained_on_saved_and_loaded(tmp_path: Path) -> None:
    model = packed()
    adapter = inject(model, AdapterConfig(rank=8))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    export_adapter(model, tmp_path / "adapter")
    assert read_metadata(tmp_path / "adapter").base.fingerprint is None
    other = packed()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(IDS).logits, model(IDS).logits)
