"""K by layer: one number, a list over decoder layers, a table by number of experts; from Python, YAML and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from talklora_pl import registry
from talklora_pl.adapter import AdapterConfig, RoutingCollector, inject
from talklora_pl.allocation.rules import Listed
from talklora_pl.balance.switch import Switch
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.errors import UserError
from talklora_pl.experts.lora import LoRA
from talklora_pl.routers import Router
from talklora_pl.routers.loss_free import LossFree
from talklora_pl.routers.top_k import NoisyTopK, TopK
from talklora_pl.routing import RoutingRecord


def config(k: Any, experts: list[int], router: Any = TopK, **options: Any) -> AdapterConfig:
    return AdapterConfig(
        targets=["q_proj", "up_proj"],
        expert_rank=2,
        experts=LoRA(),
        communication=NoCommunication(),
        router=router(k=k),
        allocation=Listed(experts),
        **options,
    )


def route(model: PreTrainedModel) -> list[RoutingRecord]:
    with RoutingCollector(model) as collector:
        model(input_ids=torch.arange(12).view(2, 6))
    return collector.records


@pytest.mark.parametrize("router", [TopK, NoisyTopK, LossFree])
@pytest.mark.parametrize(
    "k, experts, expected",
    [
        (2, [8, 4], [2, 2]),
        ([3, 2], [8, 4], [3, 2]),
        ({8: 3, 4: 2}, [4, 8], [2, 3]),
        (3, [2, 1], [2, 1]),
        ([3, 1], [2, 4], [2, 1]),
        ({1: 4, 6: 9}, [1, 6], [1, 6]),
    ],
)
def test_so_many_experts_speak(llama: PreTrainedModel, router: Any, k: Any, experts: Any, expected: Any) -> None:
    inject(llama, config(k, experts, router))
    for r in route(llama):
        K = expected[int(r.layer.split(".")[2])]
        assert r.routing.selected_TK is not None and r.routing.selected_TK.shape == (12, K)
        assert ((r.routing.weights_TE > 0).sum(-1) == K).all()
        torch.testing.assert_close(r.routing.weights_TE.sum(-1), torch.ones(12))


def test_a_list_counts_all_decoder_layers_not_the_adapted_ones(llama: PreTrainedModel) -> None:
    inject(llama, config([1, 3], [4], layers="1"))
    assert {r.routing.selected_TK.shape[1] for r in route(llama) if r.routing.selected_TK is not None} == {3}


@pytest.mark.parametrize("k", [2, [3, 2], {8: 3, 4: 2}])
def test_through_json(k: Any) -> None:
    router = TopK(k=k)
    assert registry.from_dict(Router, json.loads(json.dumps(registry.to_dict(router)))) == router


@pytest.mark.parametrize("k", [0, [], [2, 0], {}, {8: 0}])
def test_at_least_one(k: Any) -> None:
    with pytest.raises(UserError, match="k must be at least 1"):
        registry.from_dict(Router, {"name": "top_k", "k": k})


@pytest.mark.parametrize("k", ["2", 2.0, True, ["2"], {"a": 2}, {"-8": 2}, {"8": "2"}, [[2]], None])
def test_other_types_are_refused(k: Any) -> None:
    with pytest.raises(UserError, match="router 'top_k': k must be"):
        registry.from_dict(Router, {"name": "top_k", "k": k})


@pytest.mark.parametrize(
    "k, message",
    [
        ([2, 2, 2], r"k lists 3 numbers, but the model has 2 decoder layers\.$"),
        ({8: 2}, r"k has no entry for the 4 experts of 'model\.layers\.1\.self_attn\.q_proj', only for 8\.$"),
    ],
)
def test_what_does_not_fit_the_model(llama: PreTrainedModel, k: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inject(llama, config(k, [8, 4]))


def test_a_list_outside_of_the_layers(llama: PreTrainedModel) -> None:
    head = AdapterConfig(targets=["lm_head"], expert_rank=2, router=TopK(k=[2, 2]))
    with pytest.raises(UserError, match="'lm_head' is in none"):
        inject(llama, head)


def test_balance_pools_layers_of_unequal_k(llama: PreTrainedModel) -> None:
    """f and P of a layer that selects all four experts for every token are even in f; the others' as by hand."""
    loss = Switch(scope="model")
    adapter = inject(llama, config([1, 4], [4, 4], balance=[loss]))
    records = route(llama)
    chosen_E = sum(r.selections().sum(0) for r in records)
    p_E = torch.stack([r.routing.probs_TE.mean(0) for r in records]).mean(0)
    want = 4 * (chosen_E / (2 * 12 * 1 + 2 * 12 * 4) * p_E).sum()
    torch.testing.assert_close(adapter.balance["switch"](records), want)


@pytest.mark.parametrize("compat, extra", [("none", 0.0), ("published", 1.0)])
def test_one_expert_in_the_published_loss(llama: PreTrainedModel, compat: Any, extra: float) -> None:
    """A layer with one expert adds exactly 1 and no gradient, as released."""
    adapter = inject(llama, config(2, [4, 1], balance=[Switch(compat=compat)]))
    loss: Any = adapter.balance["switch"]
    records = route(llama)
    routed = [r for r in records if r.layer in adapter.routed_layers()]
    without: Any = Switch().build(adapter.routed_layers())
    value = loss(records)
    torch.testing.assert_close(value, without(routed) + extra)
    value.backward()
    for name, p in adapter.layers.named_parameters():
        if "layers.1" in name and p.grad is not None:
            assert not p.grad.any(), name


def test_plain_lora_beside_the_mixture_is_no_layer_with_one_expert(llama: PreTrainedModel) -> None:
    from talklora_pl.adapter.config import PlainLoRA

    loss = Switch(compat="published")
    adapter = inject(llama, config(2, [4, 1], balance=[loss], plain=PlainLoRA(["o_proj"])))
    assert set(adapter.balanced_layers(loss).values()) == {4, 1}
    assert not any("o_proj" in name for name in adapter.balanced_layers(loss))


def test_table_before_the_rule_has_decided(llama: PreTrainedModel) -> None:
    """``num_experts`` is no key of the table, but no layer gets it either."""
    options = config({3: 2, 1: 1}, [3, 1])
    inject(llama, options.before_allocation())
    assert options.router.k == {3: 2, 1: 1}  # type: ignore[attr-defined]


def test_on_the_command_line(tmp_path: Path) -> None:
    from talklora_pl.cli import main
    from tests.data.tiny import save_model

    save_model(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    command = [
        "fit",
        "--config=method/mola",
        f"--model.base.path={tmp_path / 'base'}",
        "--model.base.dtype=float32",
        "--model.adapter.allocation=list",
        "--model.adapter.allocation.experts=[3, 1]",
        f"--data.train={tmp_path / 'rows.jsonl'}",
        "--data.val_size=0",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
    ]

    def k_after(*arguments: str) -> Any:
        assert main([*arguments, f"--trainer.default_root_dir={folder}"]) == 0
        (adapter,) = folder.rglob("last/talklora.json")
        return AdapterConfig.from_dict(json.loads(adapter.read_text())["adapter"]).router.k  # type: ignore[attr-defined]

    folder = tmp_path / "table"
    assert k_after(*command, "--model.adapter.router.k={3: 2, 1: 1}") == {3: 2, 1: 1}
    (saved,) = folder.rglob("config.yaml")
    folder = tmp_path / "again"
    assert k_after("fit", f"--config={saved}") == {3: 2, 1: 1}
