"""Routing is collected per adapter: models of one process do not mix their records."""

from __future__ import annotations

import copy

import pytest
import torch

from talklora_pl import UserError
from talklora_pl.adapter import AdapterConfig, RoutingCollector, RoutingRecord, inject, set_adapter
from talklora_pl.routers.softmax import Softmax
from tests.conftest import tiny_llama

IDS = torch.arange(12).reshape(2, 6)


def experts_of(records: list[RoutingRecord]) -> set[int]:
    return {r.routing.weights_TE.shape[1] for r in records}


@pytest.mark.parametrize("per", ["linear", "block"])
def test_teacher_and_student_inside_of_one_another(per: str) -> None:
    """Layers have equal names in both models; only the number of experts tells whose record it is."""
    options = {"targets": ["q_proj", "k_proj"], "expert_rank": 2, "router": Softmax(per=per)}
    teacher, student = tiny_llama(), tiny_llama()
    inject(teacher, AdapterConfig(num_experts=5, **options))
    adapter = inject(student, AdapterConfig(num_experts=3, **options))
    for outer, inner in ((teacher, student), (student, teacher)):
        with RoutingCollector(outer) as of_outer:
            outer(IDS)
            with RoutingCollector(inner) as of_inner:
                inner(IDS)
                outer(IDS)
            inner(IDS)
        assert len(of_outer.records) == 2 * len(of_inner.records) == 2 * len(adapter.decisions)
        assert experts_of(of_outer.records) == {5 if outer is teacher else 3}
        assert experts_of(of_inner.records) == {5 if inner is teacher else 3}
    with RoutingCollector(adapter) as collector:
        teacher(IDS)
        copy.deepcopy(student)(IDS)
    student(IDS)
    assert collector.records == []


def test_a_model_collects_whichever_adapter_is_on_and_the_innermost_collector_alone() -> None:
    model = tiny_llama()
    for name, experts in (("one", 2), ("two", 3)):
        inject(model, AdapterConfig(targets=["q_proj"], num_experts=experts, expert_rank=2), name)
    with RoutingCollector(model) as outer:
        model(IDS)
        set_adapter(model, "one")
        model(IDS)
        with RoutingCollector(model.talklora["one"]) as inner:
            model(IDS)
    assert [r.routing.weights_TE.shape[1] for r in outer.records] == [3, 3, 2, 2]
    assert experts_of(inner.records) == {2}


def test_after_an_error_nothing_is_collected_any_more() -> None:
    model = tiny_llama()
    adapter = inject(model, AdapterConfig(targets=["q_proj"], expert_rank=2))
    with pytest.raises(ZeroDivisionError), RoutingCollector(model):
        1 / 0  # noqa: B018
    assert adapter.collectors == []


def test_a_model_without_adapters() -> None:
    with pytest.raises(UserError, match="has no adapter"), RoutingCollector(tiny_llama()):
        pass
