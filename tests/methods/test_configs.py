"""Every shipped method file: parsed by the command line, injected, all gradients there after one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from talklora_pl.adapter import AdapterConfig, RoutingCollector, inject
from tests.conftest import tiny_llama

FOLDER = Path(__file__).parents[2] / "configs" / "method"
METHODS = sorted(p.stem for p in FOLDER.glob("*.yaml"))
IDS = torch.arange(2 * 6).reshape(2, 6) * 5 % 64


def plain(value: Any) -> Any:
    """The YAML form of a component -> the form of an adapter file."""
    if isinstance(value, dict) and "class_path" in value:
        return {"name": value["class_path"], **value.get("init_args", {})}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value


def config_of(method: str) -> AdapterConfig:
    options = yaml.safe_load((FOLDER / f"{method}.yaml").read_text())["model"]["adapter"]
    return AdapterConfig.from_dict({k: plain(v) for k, v in options.items()})


@pytest.mark.parametrize("method", METHODS)
def test_file_names_its_parts_and_trains(method: str) -> None:
    options = yaml.safe_load((FOLDER / f"{method}.yaml").read_text())["model"]["adapter"]
    assert {"targets", "num_experts", "experts", "communication", "router"} <= set(options)
    model = tiny_llama()
    base = model(IDS).logits
    adapter = inject(model, config_of(method))
    assert torch.allclose(model(IDS).logits, base, atol=1e-6)
    model.train()
    with RoutingCollector(model, torch.ones(IDS.shape)) as collector:
        loss = model(input_ids=IDS, labels=IDS).loss
    for options in adapter.config.balance:
        loss = loss + options.weight * adapter.balance[options.name](collector.records)
    loss.backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
