"""What targets leave out is said with number, place and remedy; what they take is trained, saved, loaded and merged."""

from __future__ import annotations

import logging
import warnings
from abc import ABCMeta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from talklora_pl import AdapterConfig, UserError, inject, load_adapter, save_adapter
from talklora_pl.adapter.adapters import remove_adapter
from talklora_pl.adapter.config import PlainLoRA
from talklora_pl.base.weights import SafetensorsWeights
from talklora_pl.export.merge import merge_adapter
from talklora_pl.sites import left_out
from tests.adapter.test_reached import FAMILIES, build
from tests.methods.test_families import sized

IDS = torch.arange(2, 22).reshape(2, 10)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> Any:
    """All that was said so far."""
    left_out._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        yield lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("targets:")]


def lora(*targets: str, **options: Any) -> AdapterConfig:
    return sized("lora", list(targets), **options)


def untrained(model: nn.Module) -> list[str]:
    model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    return [n for n, p in model.talklora.named_parameters() if p.grad is None]


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_linear_trains_every_tensor_it_makes(kind: str, heard: Any) -> None:
    model = build(kind)
    adapter = inject(model, sized("lora", "all-linear"))
    if kind == "gemma3":  # it demands to be told, in training, which tokens are of an image
        model.register_forward_pre_hook(
            lambda m, a, kw: (a, kw | {"token_type_ids": torch.zeros_like(IDS)}), with_kwargs=True
        )
    assert untrained(model) == []
    ends = tuple(e for e in FAMILIES[kind][1] if "projector" not in e)
    said = [s for s in heard() if "does not run through" in s]
    assert len(said) == bool(ends)
    assert all(e.strip(".").replace("layers.1", "layers.*") in said[0] for e in ends)
    assert not any(n.startswith(ends) or n.endswith(ends) for n in adapter.experts_per_layer if ends)
    inject(model, sized("lora", "all-linear"), "again")
    assert [s for s in heard() if "does not run through" in s] == said  # once


def test_leaf_names_mean_the_language_model_and_layers_are_its_own() -> None:
    model = build("gemma3")
    adapter = inject(model, sized("talklora", ["q_proj"], layers="1-"))
    assert list(adapter.experts_per_layer) == ["model.language_model.layers.1.self_attn.q_proj"]
    assert list(inject(model, sized("graphlora", ["mlp"]), "g").experts_per_layer)[:2] == [
        f"model.language_model.layers.{i}.mlp" for i in (0, 1)
    ]


def test_targets_that_only_match_what_never_runs_are_refused_unless_named_in_full(tmp_path: Path) -> None:
    model = build("gemma3")
    with pytest.raises(UserError, match=r"vision_tower\S+q_proj \(2\).* list their whole names"):
        inject(model, sized("lora", r".*vision_tower.*q_proj"))
    names = [f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    adapter = inject(model, lora(*names))
    assert list(adapter.experts_per_layer) == names
    # a folder of an earlier version, which adapted both
    remove_adapter(model)
    both = [names[0], "model.language_model.layers.0.self_attn.q_proj"]
    inject(model, lora(*both))
    save_adapter(model, tmp_path)
    again = build("gemma3")
    assert sorted(load_adapter(again, tmp_path).experts_per_layer) == sorted(both)


def test_a_checkpoint_of_an_earlier_version_keeps_its_layers() -> None:
    model = build("mamba")
    names = [f"backbone.layers.{i}.mixer.{part}" for i in (0, 1) for part in ("in_proj", "dt_proj")]
    adapter = inject(model, sized("lora", ["in_proj", "dt_proj"]), allocation=dict.fromkeys(names, 1))
    assert sorted(adapter.experts_per_layer) == sorted(names)


def test_a_model_that_cannot_be_tried_is_adapted_whole_and_this_is_said(heard: Any) -> None:
    import transformers

    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=512, hidden_size=256, num_hidden_layers=2))
    adapter = inject(model, sized("lora", "all-linear"))
    assert len(adapter.experts_per_layer) == sum(isinstance(m, nn.Linear) for m in model.rwkv.modules())
    assert len(heard()) == 1
    assert "could not be tried" in heard()[0]


# ---------------------------------------------------------------- experts of the base's own mixture


@pytest.mark.parametrize(
    ("kind", "targets", "left"),
    [
        ("mixtral", "all-linear", True),
        ("gpt_oss", "all-linear", True),
        ("qwen2_moe", ["down_proj"], True),  # the shared expert's, not those of the routed ones
        ("qwen2_moe", ["gate_proj"], True),
        ("deepseek_v3", ["up_proj"], True),  # dense and shared ones
        ("mixtral", ["q_proj"], False),
        ("mixtral", r".*self_attn.*", False),
        ("qwen2_moe", r".*mlp.*", True),
        ("mixtral", ["q_proj", "experts"], False),
        ("llama", "all-linear", False),
    ],
)
def test_experts_that_are_left_out_are_told_of(kind: str, targets: Any, left: bool, heard: Any) -> None:
    inject(build(kind), sized("lora", targets))
    said = [s for s in heard() if "own mixture" in s]
    assert len(said) == left
    if left:
        assert "mlp.experts (" in said[0]
        assert "plain: {targets: [experts], rank: 8}" in said[0]


def test_what_plain_lora_takes_is_not_left_out(heard: Any) -> None:
    model = build("mixtral")
    adapter = inject(model, sized("talklora", "all-linear", plain={"targets": ["experts"], "rank": 2}))
    assert adapter.plain_layers == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert heard() == []
    assert untrained(model) == []


@pytest.mark.parametrize("method", ["talklora", "mola", "moelora"])
def test_routed_methods_on_the_experts_of_a_base_are_refused(method: str) -> None:
    model = build("qwen3_moe")
    with pytest.raises(UserError, match=r"mlp.experts' holds the experts .* plain LoRA only.*method/lora"):
        inject(model, sized(method, ["q_proj", "experts"]))
    assert not hasattr(model, "talklora")


def double(kind: str) -> Any:
    model = build(kind).double()
    model.config._experts_implementation = "eager"  # the default one has no float64
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_start_at_the_base_and_are_saved_loaded_and_merged(kind: str, tmp_path: Path) -> None:
    model = double(kind)
    base = model(input_ids=IDS).logits
    adapter = inject(model, lora("q_proj", "experts", dtype="float64"))
    torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=1e-6, atol=1e-6)  # norms and routers are float32
    for p in adapter.parameters():
        p.data.normal_(std=0.3)
    want = model.eval()(input_ids=IDS).logits
    assert (want - base).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    again = double(kind)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=0, atol=0)
    merge_adapter(again)
    torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=1e-6, atol=1e-6)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert untrained(model) == []


def test_messages_give_true_reasons() -> None:
    config = AdapterConfig(rank=8)  # default targets
    with pytest.raises(UserError, match="all-linear") as e:
        inject(build("mamba2"), config)
    assert "mixture" not in str(e.value)
    with pytest.raises(UserError, match=r"all-linear.*mlp.experts'.*plain: {targets: \[experts\]"):
        inject(build("mixtral"), config)
    with pytest.raises(UserError, match="Llama4TextExperts is not written for transformers' common interface"):
        inject(build("llama4_text"), AdapterConfig(rank=8, targets=["q_proj"], plain=PlainLoRA(["experts"])))


# ---------------------------------------------------------------- places


def test_a_linear_with_another_base_class_in_front() -> None:
    class Slotted:
        __slots__ = ()

    for other in (ABCMeta("Mixin", (), {}), Slotted):
        quantised: Any = type(other)("QLinear", (other, nn.Linear), {})
        model = build("llama")
        base = model(input_ids=IDS).logits
        for module in model.model.layers.modules():
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    new = quantised(child.in_features, child.out_features, bias=False)
                    new.weight = child.weight
                    setattr(module, name, new)
        inject(model, lora("q_proj"))
        torch.testing.assert_close(model(input_ids=IDS).logits, base)
        assert untrained(model) == []
        remove_adapter(model)
        assert type(model.model.layers[0].self_attn.q_proj) is quantised


def test_weights_of_a_composite_are_found_in_its_files(tmp_path: Path) -> None:
    model = build("gemma3")
    model.save_pretrained(tmp_path)
    weights = SafetensorsWeights(tmp_path)
    for name in (
        "model.language_model.layers.1.self_attn.q_proj",
        "model.vision_tower.encoder.layers.1.self_attn.q_proj",
    ):
        torch.testing.assert_close(weights.matrix(name), model.get_submodule(name).weight.data, rtol=0, atol=0)
    with pytest.raises(UserError, match="is not in the checkpoint"):
        weights.matrix("model.language_model.layers.7.self_attn.q_proj")


def test_tensors_without_a_gradient_after_the_first_batch_are_told_of_once() -> None:
    from types import SimpleNamespace

    from talklora_pl.module import FineTuner

    idle, learns = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    learns.grad = torch.zeros(1)
    run: Any = SimpleNamespace(_told_of_idle=False, trained=lambda: {"layers.m.layers.3.x_proj.A": idle, "b": learns})
    with pytest.warns(UserWarning, match=r"to 1 trained tensors: layers.m.layers.\*.x_proj.A \(1\)"):
        FineTuner.on_after_backward(run)
    assert run._told_of_idle
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FineTuner.on_after_backward(run)
