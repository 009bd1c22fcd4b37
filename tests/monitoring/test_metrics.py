"""Every metric against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from talklora_pl.monitoring.metrics import Load, RoutingLoad, overlap, top_experts
from talklora_pl.routing import Routing, RoutingRecord


def dense(layer: str, probs: list[list[float]], mask: list[int] | None = None) -> RoutingRecord:
    p_TE = torch.tensor(probs)
    keep = torch.ones(len(probs)) if mask is None else torch.tensor(mask)
    return RoutingRecord(layer, Routing(p_TE, p_TE, p_TE.log()), keep.bool())


def sparse(layer: str, probs: list[list[float]], k: int, mask: list[int] | None = None) -> RoutingRecord:
    r = dense(layer, probs, mask)
    best_TK, chosen_TK = r.routing.probs_TE.topk(k)
    w_TE = torch.zeros_like(r.routing.probs_TE).scatter(1, chosen_TK, best_TK / best_TK.sum(1, keepdim=True))
    return RoutingRecord(layer, Routing(w_TE, r.routing.probs_TE, r.routing.logits_TE, chosen_TK), r.mask_T)


def load_of(*records: RoutingRecord, **options: object) -> Load:
    metric = RoutingLoad({r.layer: r.routing.weights_TE.shape[1] for r in records})
    metric.update(records, **options)
    return metric.summary()


def close(value: Tensor, expected: object) -> None:
    torch.testing.assert_close(value.double(), torch.tensor(expected, dtype=torch.double), atol=1e-6, rtol=1e-6)


def test_dense_router_by_hand() -> None:
    # the third token is a pad whose row is no number at all
    load = load_of(dense("a", [[0.7, 0.2, 0.1, 0.0], [0.5, 0.1, 0.4, 0.0], [float("nan")] * 4], [1, 1, 0]))
    close(load.share_LE, [[0.6, 0.15, 0.25, 0.0]])
    close(load.relative_LE, [[2.4, 0.6, 1.0, 0.0]])
    m = load.per_layer()
    close(m["cv"], [math.sqrt((1.4**2 + 0.4**2 + 0 + 1) / 4)])
    close(m["max_vio"], [1.4])
    close(m["dead_experts"], [0.25])
    entropy = -(0.6 * math.log(0.6) + 0.15 * math.log(0.15) + 0.25 * math.log(0.25))
    close(m["effective_experts"], [math.exp(entropy)])
    tokens = [-(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))]
    tokens += [-(0.5 * math.log(0.5) + 0.1 * math.log(0.1) + 0.4 * math.log(0.4))]
    close(m["token_entropy"], [sum(tokens) / 2 / math.log(4)])
    close(m["margin"], [(0.5 + 0.1) / 2])
    close(m["router_z"], [0.0])  # the logits are log-probabilities


def test_even_load_is_ideal() -> None:
    m = load_of(dense("a", [[0.25] * 4] * 3)).per_layer()
    for key, value in {"cv": 0, "max_vio": 0, "dead_experts": 0, "effective_experts": 4, "token_entropy": 1}.items():
        close(m[key], [value])


def test_selecting_router_counts_selections() -> None:
    load = load_of(sparse("a", [[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.4, 0.1, 0.5], [0.9, 0.1, 0.0]], 2, [1, 1, 1, 0]))
    close(load.share_LE, [[3 / 6, 2 / 6, 1 / 6]])  # pairs {0,1}, {1,0}, {2,0}
    close(load.token_share_LE, [[1.0, 2 / 3, 1 / 3]])
    close(load.per_layer()["max_vio"], [0.5])


def test_router_z() -> None:
    r = dense("a", [[0.5, 0.5]])
    logits = Routing(*r.routing[:2], torch.full((1, 2), 3.0))
    close(load_of(RoutingRecord("a", logits, r.mask_T)).router_z, [(3 + math.log(2)) ** 2])


def test_unequal_layers_and_their_mean() -> None:
    load = load_of(dense("a", [[0.5, 0.5]] * 2), dense("b", [[1.0, 0.0, 0.0, 0.0]] * 2))
    assert load.layers == ["a", "b"]
    m = load.per_layer()
    close(m["effective_experts"], [2, 1])
    close(m["dead_experts"], [0, 0.75])
    close(m["max_vio"], [0, 3])
    mean = load.aggregates()
    assert mean["effective_experts"] == pytest.approx(1.5)
    assert (mean["max_vio"], mean["max_vio_worst"]) == (pytest.approx(1.5), pytest.approx(3))


def test_micro_steps_of_unequal_length_weigh_by_tokens() -> None:
    parts = [dense("a", [[0.9, 0.1]] * 3 + [[0.5, 0.5]], [1, 1, 1, 0]), dense("a", [[0.1, 0.9]])]
    metric = RoutingLoad({"a": 2})
    for part in parts:
        metric.update([part])
    close(metric.summary().share_LE, [[0.7, 0.3]])
    metric.reset()
    metric.update(parts[1:])
    close(metric.summary().share_LE, [[0.1, 0.9]])


def test_tasks() -> None:
    # two rows of two tokens, then one row of a third task
    metric = RoutingLoad({"a": 2})
    metric.update([dense("a", [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], [1, 1, 1, 0])], ["x", "y"])
    metric.update([dense("a", [[0.5, 0.5]])], ["z"])
    load = metric.summary()
    assert load.tasks == ["x", "y", "z"]
    close(load.tokens_N, [2, 1, 1])
    close(load.task_share_LNE, [[[1, 0], [0, 1], [0.5, 0.5]]])
    close(load.share_LE, [[2.5 / 4, 1.5 / 4]])
    close(load.task_distance_LN(), [[0.375, 0.625, 0.125]])


def test_tasks_of_questions_with_several_rows() -> None:
    metric = RoutingLoad({"a": 2})
    rows = dense("a", [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    metric.update([rows], ["x", "y"], question_B=torch.tensor([0, 1, 1]))
    load = metric.summary()
    assert load.tasks == ["x", "y"]
    close(load.tokens_N, [1, 2])
    close(load.task_share_LNE, [[[1, 0], [0.5, 0.5]]])


def test_filler_counts_nothing() -> None:
    metric = RoutingLoad({"a": 2})
    metric.update([dense("a", [[0.9, 0.1]])])
    metric.update([dense("a", [[0.0, 1.0]])], filler=True)
    close(metric.summary().share_LE, [[0.9, 0.1]])


def test_large_models_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    records = [sparse(str(i), torch.rand(7, 4).softmax(1).tolist(), 2) for i in range(5)]
    whole = load_of(*records)
    monkeypatch.setattr("talklora_pl.monitoring.metrics.MAX_ELEMENTS", 60)
    parts = load_of(*records)
    torch.testing.assert_close(parts.share_LE, whole.share_LE)
    torch.testing.assert_close(parts.token_entropy, whole.token_entropy)


def test_overlap_ignores_order() -> None:
    before = torch.tensor([[0, 1], [2, 3], [0, 2]])
    assert overlap(before, before) == 1
    assert overlap(before, torch.tensor([[1, 0], [2, 0], [1, 3]])) == pytest.approx(1.5 / 3)
    assert top_experts(dense("a", [[0.1, 0.9], [0.8, 0.2]], [1, 0])).tolist() == [[1]]
