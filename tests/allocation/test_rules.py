"""Rules: totals, floors, shapes for any depth, and what they refuse."""

import json
from itertools import pairwise

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from talklora_pl import registry
from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.adapter.allocation import decide, layer_targets, layers_without_targets
from talklora_pl.allocation import Allocation, LayerTargets
from talklora_pl.allocation.alpha import Alpha, apportion
from talklora_pl.allocation.rules import File, Groups, Listed, Published, UniformAllocation
from talklora_pl.base.weights import ModuleWeights
from talklora_pl.errors import UserError


def layers(n: int, modules: tuple[str, ...] = ("q", "v")) -> list[LayerTargets]:
    return [
        LayerTargets(i, tuple(f"layers.{i}.{m}" for m in modules), tuple(f"layers.{i}.{m}" for m in (*modules, "o")))
        for i in range(n)
    ]


def counts(rule: Allocation, n: int) -> list[int]:
    found = rule.allocate(layers(n), 4)
    assert list(found) == [m for layer in layers(n) for m in layer.modules]
    assert all(found[f"layers.{i}.q"] == found[f"layers.{i}.v"] for i in range(n))
    return [found[f"layers.{i}.q"] for i in range(n)]


alphas = st.lists(st.floats(1.05, 15), min_size=1, max_size=40)


@settings(deadline=None, max_examples=200)
@given(alphas, st.integers(0, 200), st.floats(0, 6))
def test_largest_remainder_properties(exponents, extra, beta):
    budget = len(exponents) + extra
    found = apportion(exponents, budget, beta)
    assert sum(found) == budget and min(found) >= 1
    # a layer with the larger score never gets fewer
    scores = [a**beta for a in exponents]
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    assert all(found[a] <= found[b] for a, b in pairwise(order) if scores[a] < scores[b] * (1 - 1e-9))
    # nobody with several experts is more than one off its share of them
    pool = [i for i in range(len(found)) if found[i] > 1]
    in_pool = budget - (len(found) - len(pool))
    share = {i: in_pool * scores[i] / sum(scores[j] for j in pool) for i in pool}
    assert all(abs(found[i] - share[i]) <= 1 + 1e-9 for i in pool)


def test_equal_exponents_are_uniform():
    assert apportion([3.3] * 32, 160) == [5] * 32
    assert apportion([3.3] * 7, 9) == [2, 2, 1, 1, 1, 1, 1]  # ties to the lower index


def test_floor_takes_layers_out_of_the_pool():
    # shares 0.06 and 0.99 of 12: both are raised to 1, and the third keeps what is left of the budget
    assert apportion([0.5, 8.2, 91.3], 12, beta=1) == [1, 1, 10]


@pytest.mark.parametrize(
    ("exponents", "budget", "beta", "message"),
    [
        ([2.0] * 5, 4, 2.5, "too small for 5"),
        ([2.0, 0.0], 4, 2.5, "Exponent 1 is 0.0"),
        ([2.0, float("nan")], 4, 2.5, "Exponent 1 is nan"),
        ([2.0, 3.0], 4, 1e6, "beyond the range"),
        ([2.0, 3.0], 4, -1e6, "beyond the range"),
    ],
)
def test_apportion_refuses(exponents, budget, beta, message):
    with pytest.raises(UserError, match=message):
        apportion(exponents, budget, beta)


def test_groups_of_the_published_depth():
    for shape in ([2, 4, 6, 8], [8, 6, 4, 2], [5, 5, 5, 5], [8, 2, 2, 8]):
        assert counts(Groups(shape), 32) == [n for n in shape for _ in range(8)]
    assert sum(counts(Groups([8, 2, 2, 8]), 32)) == 160


def test_groups_of_any_depth():
    found = counts(Groups(), 30)
    assert found == sorted(found) and set(found) == {2, 4, 6, 8}
    assert {found.count(n) for n in (2, 4, 6, 8)} == {7, 8}
    with pytest.raises(UserError, match="4 groups for 3 layers"):
        counts(Groups(), 3)


def test_uniform_list_file_and_table(tmp_path):
    assert counts(UniformAllocation(), 3) == [4, 4, 4]
    assert counts(Listed([1, 2, 3]), 3) == [1, 2, 3]
    table = {"layers.0.q": 1, "layers.0.v": 2, "layers.1.q": 3, "layers.1.v": 4}
    assert Listed(table).allocate(layers(2), 9) == table
    forms = [
        [3, 1],
        {"experts": [3, 1]},
        {"model": {"adapter": {"allocation": {"class_path": "list", "init_args": {"experts": [3, 1]}}}}},
    ]
    for form in forms:
        for write in (yaml.safe_dump, json.dumps):
            (tmp_path / "a.yaml").write_text(write(form))
            assert counts(File(str(tmp_path / "a.yaml")), 2) == [3, 1]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: Listed([1, 2, 3]), "3 entries, but 2 decoder layers"),
        (lambda: Listed([1, 0]), "entry 1 is 0"),
        (lambda: Listed([1, True]), "entry 1 is True"),
        (lambda: Listed({"layers.0.q": 1}), "3 target modules have no entry"),
        (lambda: Listed("12"), "expected a list"),
        (lambda: Published(), "32 entries, but 2 decoder layers"),
        (lambda: Published("alphalora-mistral"), "Did you mean 'alphalora-mistral-7b'"),
        (lambda: File("absent.yaml"), "there is no file"),
        (lambda: Groups([2, 0]), "entry 1 is 0"),
        (lambda: Groups([]), "at least one"),
        (lambda: Alpha(), "needs the frozen weights"),
        (lambda: Alpha(estimator="peek"), "none of peak"),
        (lambda: Alpha(budget=0), "at least 1"),
        (lambda: Alpha(granularity="module", compat="official"), "per layer"),
    ],
)
def test_bad_options(rule, message):
    with pytest.raises(UserError, match=message):
        rule().allocate(layers(2), 4)


def test_broken_file(tmp_path):
    (tmp_path / "a.yaml").write_text("experts: [1, 2")
    with pytest.raises(UserError, match="not valid YAML"):
        File(str(tmp_path / "a.yaml")).allocate(layers(2), 4)


def test_registry_round_trip():
    for rule in (UniformAllocation(), Groups([1, 9]), Listed([1, 2]), Published(), Alpha(budget=7, estimator="median")):
        assert registry.from_dict(Allocation, registry.to_dict(rule)) == rule
    assert set(registry.names(Allocation)) >= {"alpha", "uniform", "groups", "list", "file", "published"}


def test_layers_of_a_model(llama):
    found = layer_targets(llama, ["q_proj", "down_proj"])
    assert [layer.index for layer in found] == [0, 1]
    assert found[1].modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    assert len(found[0].all_modules) == 7
    assert [layer.index for layer in layer_targets(llama, "all-linear", layers="1-")] == [1]


def test_layers_without_targets(llama):
    del llama.model.layers[1].mlp.up_proj
    assert layers_without_targets(llama, layer_targets(llama, ["up_proj"])) == ["model.layers.1"]
    assert layers_without_targets(llama, layer_targets(llama, ["q_proj"])) == []


def options(rule: Allocation, num_experts: int = 4) -> AdapterConfig:
    return AdapterConfig(
        targets=["q_proj", "v_proj", "up_proj"], num_experts=num_experts, expert_rank=2, allocation=rule
    )


def test_alpha_per_layer_and_per_module(llama):
    with torch.no_grad():  # a heavy tail in layer 0: it deserves less
        for name, p in llama.named_parameters():
            if "layers.0" in name and p.ndim == 2:
                p.mul_(torch.logspace(0, 2, p.shape[0])[:, None])
    weights = ModuleWeights(llama)
    per_layer = decide(options(Alpha(budget=8, estimator="median")), llama, weights)
    assert per_layer["model.layers.0.mlp.up_proj"] < per_layer["model.layers.1.mlp.up_proj"]
    assert sum(per_layer.values()) == 3 * 8
    per_module = decide(options(Alpha(budget=8, estimator="median", granularity="module")), llama, weights)
    assert sum(per_module.values()) == 3 * 8 and len(set(per_module.values())) > 2
    same = decide(options(Alpha(beta=0, estimator="median"), 3), llama, weights)
    assert set(same.values()) == {3}
    with pytest.raises(UserError, match="budget of 1 experts is too small for 2 layers"):
        decide(options(Alpha(budget=1)), llama, weights)
    # without a decision from outside, injection takes the rule's
    adapter = inject(llama, options(Alpha(budget=8, estimator="median")))
    assert adapter.experts_per_layer == per_layer


def test_targets_outside_of_the_layers_keep_the_configured_number(llama):
    config = AdapterConfig(targets=["q_proj", "lm_head"], num_experts=7, expert_rank=2, allocation=Listed([1, 2]))
    found = decide(config, llama, ModuleWeights(llama))
    assert found == {"model.layers.0.self_attn.q_proj": 1, "model.layers.1.self_attn.q_proj": 2, "lm_head": 7}
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
