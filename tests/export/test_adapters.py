"""Several adapters on one base: load, switch, disable, remove; heads and new tokens go with theirs; base checked."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from talklora_pl import (
    AdapterConfig,
    UserError,
    disable_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
)
from talklora_pl.adapter.fingerprint import agree, fingerprint
from tests.export import models
from tests.methods.test_configs import METHODS, config_of

PLAIN = AdapterConfig.from_dict(
    {
        "targets": "all-linear",
        "num_experts": 1,
        "rank": 4,
        "experts": "lora",
        "communication": "none",
        "router": "uniform",
    }
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.save_base(tmp_path / "base", "llama")


def saved(base: Path, folder: Path, config: AdapterConfig, seed: int = 0, family: str = "llama") -> torch.Tensor:
    """Logits of an adapter that was saved to ``folder``."""
    model = models.load(base, family)
    models.train(model, config, seed)
    save_adapter(model, folder)
    return models.logits(model)


def test_switch_disable_remove(base: Path, tmp_path: Path) -> None:
    want = {
        "talk": saved(base, tmp_path / "talk", config_of("talklora"), 1),
        "mixture": saved(base, tmp_path / "mixture", config_of("mixlora"), 2),
        "plain": saved(base, tmp_path / "plain", PLAIN, 3),
    }
    model = models.load(base)
    keys, alone = set(model.state_dict()), models.logits(model)
    for name, logits in want.items():
        load_adapter(model, tmp_path / name, name)
        assert torch.equal(models.logits(model), logits)
    for name in ("talk", "plain", "mixture"):
        set_adapter(model, name)
        assert torch.equal(models.logits(model), want[name])
        with disable_adapter(model):
            assert torch.equal(models.logits(model), alone)
    remove_adapter(model, "mixture")
    set_adapter(model, "plain")
    assert torch.equal(models.logits(model), want["plain"])
    with pytest.raises(UserError, match=r"no adapter 'mixture'; loaded: talk, plain"):
        set_adapter(model, "mixture")
    remove_adapter(model, "plain")
    assert torch.equal(models.logits(model), want["talk"])
    remove_adapter(model, "talk")
    assert torch.equal(models.logits(model), alone) and set(model.state_dict()) == keys
    assert not any("Adapted" in type(m).__name__ for m in model.modules())


def test_memory_is_the_adapters_only(base: Path, tmp_path: Path) -> None:
    def in_memory() -> dict[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    saved(base, tmp_path / "a", config_of("talklora"))
    file = (tmp_path / "a" / "adapter.safetensors").stat().st_size
    model = models.load(base)
    before = in_memory()
    for name in ("a", "b", "c"):
        load_adapter(model, tmp_path / "a", name)
    new = sum(size for at, size in in_memory().items() if at not in before)
    assert new <= 3 * file
    for name in ("a", "b", "c"):
        remove_adapter(model, name)
    assert sum(size for at, size in in_memory().items() if at not in before) < file / 10


def test_every_adapter_has_its_own_head(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base", "bert")
    config = AdapterConfig(targets="all-linear", rank=8, modules_to_save=["classifier"])
    want = {n: saved(base, tmp_path / n, config, seed, "bert") for seed, n in enumerate(("a", "b"))}
    model = models.load(base, "bert")
    head, alone = model.classifier.weight.clone(), models.logits(model)
    load_adapter(model, tmp_path / "a", "a")
    load_adapter(model, tmp_path / "b", "b", trainable=True)
    for name in ("a", "b", "a"):
        set_adapter(model, name)
        assert torch.equal(models.logits(model), want[name])
    with disable_adapter(model):
        assert torch.equal(models.logits(model), alone)
    set_adapter(model, "b")
    with torch.no_grad():
        model.classifier.weight.add_(1)  # a step of training
    set_adapter(model, "a")
    save_adapter(model, tmp_path / "again", "b")
    set_adapter(model, "b")
    trained = models.logits(model)
    other = models.load(base, "bert")
    load_adapter(other, tmp_path / "again")
    assert torch.equal(models.logits(other), trained)
    remove_adapter(model, "b")
    remove_adapter(model, "a")
    assert torch.equal(model.classifier.weight, head)


def test_an_adapter_beside_one_with_a_head(base: Path, tmp_path: Path) -> None:
    """What is the base does not depend on which adapter is on when another one is loaded, saved or removed."""
    want = {
        "head": saved(base, tmp_path / "head", AdapterConfig(rank=8, modules_to_save=["embed_tokens", "lm_head"]), 1),
        "talk": saved(base, tmp_path / "talk", config_of("talklora"), 2),
    }
    model = models.load(base)
    for name in ("head", "talk"):  # the second one while the head of the first is in place
        load_adapter(model, tmp_path / name, name)
        assert torch.equal(models.logits(model), want[name])
    set_adapter(model, "head")
    save_adapter(model, tmp_path / "again", "talk")
    assert torch.equal(models.logits(model), want["head"])
    other = models.load(base)
    load_adapter(other, tmp_path / "again")
    assert torch.equal(models.logits(other), want["talk"])
    with disable_adapter(model):
        remove_adapter(model, "head")
    assert torch.equal(models.logits(model), want["talk"])


def test_new_tokens_go_along(base: Path, tmp_path: Path) -> None:
    model = models.load(base)
    model.resize_token_embeddings(models.VOCABULARY + 3, mean_resizing=False)
    models.train(model, AdapterConfig(rank=8, modules_to_save=["embed_tokens", "lm_head"]))
    save_adapter(model, tmp_path / "a")
    ids = torch.tensor([[1, models.VOCABULARY + 2, 5]])
    other = models.load(base)
    alone = other(ids[:, :1]).logits
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert other(input_ids=ids, labels=ids).loss.isfinite()
    assert other.generate(ids, max_new_tokens=3, num_beams=2).shape[1] == 6
    with disable_adapter(other):
        assert torch.equal(other(ids[:, :1]).logits, alone)
    remove_adapter(other)
    assert torch.equal(other(ids[:, :1]).logits, alone) and other.config.vocab_size == models.VOCABULARY


# --- the base


@pytest.mark.parametrize("family", models.FAMILIES)
def test_fingerprint_is_the_same_in_every_dtype_and_tells_models_apart(family: str, tmp_path: Path) -> None:
    folder = models.save_base(tmp_path / "base", family)
    full = fingerprint(models.load(folder, family))
    assert full is not None and fingerprint(models.load(folder, family, torch.bfloat16)) == full
    assert fingerprint(models.load(folder, family, torch.float64)) == full
    half = fingerprint(models.load(folder, family, torch.float16))
    assert half is not None and agree(half, full)
    other = fingerprint(models.load(models.save_base(tmp_path / "other", family, seed=1), family))
    assert other is not None and not agree(other, full)
    model = models.load(folder, family)
    with torch.no_grad():
        for name, p in model.named_parameters():  # any single matrix that is not the same
            if p.dim() == 2:
                p.mul_(1.02)
                assert not agree(fingerprint(model) or "", full), name
                p.div_(1.02)
    assert agree(fingerprint(model) or "", full)


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", PLAIN)
    other = models.load(models.save_base(tmp_path / "other", "llama", seed=1))
    with pytest.raises(UserError, match=r"trained on other weights, those of .*base"):
        load_adapter(other, tmp_path / "a")
    assert not hasattr(other, "talklora")
    load_adapter(other, tmp_path / "a", check_base=False)
    with pytest.raises(UserError, match="belongs to a 'llama' model"):
        load_adapter(models.load(models.save_base(tmp_path / "gpt2", "gpt2"), "gpt2"), tmp_path / "a")


# --- merging


def single(method: str) -> AdapterConfig:
    """The options of a method file with one expert per layer."""
    options = config_of(method).to_dict() | {"num_experts": 1, "rank": None, "expert_rank": 4, "balance": []}
    options["allocation"] = {"name": "uniform"}
    options["router"].pop("k", None)
    return AdapterConfig.from_dict(options)


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_merges_exactly(method: str, base: Path) -> None:
    model = models.load(base, dtype=torch.float64)
    models.train(model, single(method))
    want = models.logits(model)
    merge_adapter(model)
    assert not hasattr(model, "talklora")
    assert torch.allclose(models.logits(model), want, atol=1e-6)


@pytest.mark.parametrize("experts", ["lora", "split_lora", "shared_a", "shared_b"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_uniform_router_merges_exactly(experts: str, family: str, tmp_path: Path) -> None:
    model = models.load(models.save_base(tmp_path / "base", family), family)
    options = {"targets": "all-linear", "rank": 8, "alpha": 3.0, "experts": experts}
    models.train(model, AdapterConfig.from_dict({**options, "communication": "none", "router": "uniform"}))
    want = models.logits(model)
    merge_adapter(model)
    assert torch.allclose(models.logits(model), want, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_merging_what_the_token_routes_says_why(method: str, base: Path) -> None:
    model = models.load(base)
    models.train(model, config_of(method))
    want = models.logits(model)
    with pytest.raises(UserError, match=r"cannot be merged: router '\w+' weighs the experts anew.*load_adapter"):
        merge_adapter(model)
    assert torch.equal(models.logits(model), want)


def test_a_base_spread_over_devices_by_accelerate(base: Path, tmp_path: Path) -> None:
    """accelerate replaces the forward of every layer; the adapter has to run inside of it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for method in ("talklora", "mixlora"):
        want = saved(base, tmp_path / method, config_of(method))
        model = models.load(base)
        alone = models.logits(model)
        for module in model.modules():
            if not list(module.children()) or type(module).__name__ == "LlamaMLP":
                add_hook_to_module(module, AlignDevicesHook("cpu"))
        load_adapter(model, tmp_path / method)
        assert torch.allclose(models.logits(model), want, atol=1e-6)
        with disable_adapter(model):
            assert torch.equal(models.logits(model), alone)
        remove_adapter(model)
        assert torch.equal(models.logits(model), alone)
    model = models.load(base)
    model.model.layers[0].mlp.up_proj.forward = lambda x: x
    with pytest.raises(UserError, match=r"forward of .*up_proj' was replaced"):
        load_adapter(model, tmp_path / "talklora")
    assert not hasattr(model, "talklora")
