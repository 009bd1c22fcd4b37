"""A model with adapters survives copying, pickling and the way to another process: equal logits, nothing shared."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from talklora_pl import AdapterConfig, disable_adapter, load_adapter, remove_adapter, save_adapter, set_adapter
from talklora_pl.adapter.host import Adapted
from talklora_pl.routers.loss_free import LossFree
from tests.export import models
from tests.methods.test_configs import METHODS, config_of


def saved_whole(model: nn.Module) -> Any:
    """Through a file of ``torch.save``."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved_whole,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_base(tmp_path_factory.mktemp("base") / "base", "llama")


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_copy_computes_the_same_by_tensors_of_its_own(base: Path, method: str, way: str) -> None:
    model = models.load(base)
    models.train(model, config_of(method))
    want = models.logits(model)
    other = COPIES[way](model)
    assert type(other) is type(model) and torch.equal(models.logits(other), want)
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    with torch.no_grad():
        for p in other.talklora.parameters():
            p.zero_()
    assert not torch.equal(models.logits(other), want)
    assert torch.equal(models.logits(model), want)
    remove_adapter(other)
    assert not any(isinstance(m, Adapted) for m in other.modules())
    with disable_adapter(model):
        assert torch.equal(models.logits(other), models.logits(model))


@pytest.mark.parametrize("way", COPIES)
def test_several_adapters_each_with_a_head(base: Path, tmp_path: Path, way: str) -> None:
    want = {}
    for seed, name in enumerate(("one", "two")):
        model = models.load(base)
        models.train(model, AdapterConfig(rank=8, modules_to_save=["lm_head"]), seed)
        want[name] = models.logits(model)
        save_adapter(model, tmp_path / name)
    model = models.load(base)
    for name in want:
        load_adapter(model, tmp_path / name, name)
    other = COPIES[way](model)
    for name, logits in want.items():
        set_adapter(other, name)
        assert torch.equal(models.logits(other), logits)
    with disable_adapter(other):
        assert torch.equal(models.logits(other), models.logits(models.load(base)))


def test_every_activation_of_a_router(base: Path) -> None:
    model = models.load(base)
    models.train(model, AdapterConfig(expert_rank=2, router=LossFree(activation="softmax")))
    assert torch.equal(models.logits(COPIES["pickle"](model)), models.logits(model))


def _in_the_other_process(_: int, model: nn.Module, found: Tensor) -> None:
    found.copy_(models.logits(model))


@pytest.mark.slow
def test_a_process_started_by_spawn(base: Path) -> None:
    model = models.load(base)
    models.train(model, AdapterConfig(rank=8))
    want = models.logits(model)
    found = torch.full_like(want, torch.nan).share_memory_()
    mp.spawn(_in_the_other_process, (model, found), nprocs=1)
    assert torch.equal(found, want)
