"""Exponents and counts of the released code. Another folder of the same structure: GOLDEN_DIR."""

import json

import pytest
import torch
from safetensors.torch import load_file

from talklora_pl.allocation import LayerTargets
from talklora_pl.allocation.alpha import Alpha, apportion
from talklora_pl.allocation.rules import Published
from talklora_pl.allocation.spectra import eigenvalues, exponents_of, hill, median, peak
from talklora_pl.base.weights import SafetensorsWeights
from talklora_pl.errors import UserError
from talklora_pl.routers.top_k import TopK
from talklora_pl.spec import LayerSpec
from tests.golden import cases


@pytest.fixture(scope="module", params=cases("alphalora"))
def file(request):
    return request.param


@pytest.fixture(scope="module")
def golden(file):
    return json.loads(file.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def matrices(file):
    return load_file(file)


def test_exponents(golden, matrices):
    for case in golden["matrices"]:
        found = exponents_of(matrices[case["name"]])
        assert found.eigenvalues == case["N"]
        assert found.peak == pytest.approx(case["alpha_peak"], abs=1e-4), case["name"]
        assert found.median == pytest.approx(case["alpha_median_cut"], abs=1e-4), case["name"]
        assert found.hill == pytest.approx(case["alpha_hill_top_half"], abs=1e-4), case["name"]


def test_a_batch_of_spectra_equals_one_by_one(matrices):
    by_size: dict[int, list[torch.Tensor]] = {}
    for weight in matrices.values():
        by_size.setdefault(min(weight.shape), []).append(eigenvalues(weight))
    batches = [torch.stack(group) for group in by_size.values() if len(group) > 1]
    assert batches
    for batch in batches:
        for estimate in (peak, median, hill):
            torch.testing.assert_close(
                estimate(batch), torch.stack([estimate(row) for row in batch]), rtol=1e-12, atol=0
            )


def test_layer_mean(golden, tmp_path, matrices):
    from safetensors.torch import save_file

    save_file({f"layer.{name}.weight": weight for name, weight in matrices.items()}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    layers = [
        LayerTargets(i, (), tuple(f"layer.{name}" for name in case["matrices"]))
        for i, case in enumerate(golden["layer_mean"])
    ]
    expected = [case["alpha"] for case in golden["layer_mean"]]
    assert Alpha().layer_alphas(layers, weights) == pytest.approx(expected, abs=1e-4)


def top_k_of(num_experts: int) -> int:
    """K that the router with the published K = 2 uses in a layer of so many experts: ``2 if n > 1 else 1``."""
    layer = LayerSpec("layers.0.q", "q-2x2", 0, 2, 2, num_experts, num_experts, rank=1)
    return TopK(k=2).build(layer, 1).k


def test_allocations(golden):
    refused = 0
    for case in golden["allocations"]:
        options = case["alpha"], case["T"], case["beta"]
        assert apportion(*options) == case["largest_remainder"]
        if 0 in case["official"]:
            refused += 1
            with pytest.raises(UserError, match=f"layer {case['official'].index(0)} without experts"):
                apportion(*options, compat="official")
        else:
            assert apportion(*options, compat="official") == case["official"]
            assert [top_k_of(n) for n in case["official"]] == case["official_top_k"]
    assert refused < len(golden["allocations"])


def test_published_list(golden):
    case = golden["published_mistral_7b"]
    layers = [LayerTargets(i, (f"layers.{i}.q",), ()) for i in range(len(case["experts"]))]
    counts = list(Published().allocate(layers, 5).values())
    assert counts == case["experts"] and sum(counts) == case["T"]
    assert [top_k_of(n) for n in counts] == case["top_k"]
