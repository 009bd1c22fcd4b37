"""Exponents: invariances, known tails, and matrices that have none."""

import numpy as np
import pytest
import torch

from talklora_pl.allocation.spectra import eigenvalues, exponents_of, hill, median, peak
from talklora_pl.errors import UserError


def heavy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) / torch.rand(1, columns, generator=generator)


def naive_peak(eig: np.ndarray) -> float:
    """The definition of docs/allocation.md, one loop per line."""
    logs = np.log10(eig)
    counts, edges = np.histogram(logs, 100)
    top = 10 ** edges[counts.argmax()]
    best = (np.inf, 0.0)
    for i in range(len(eig) - 1):
        if np.log10(0.95 * top) <= eig[i] <= 1.5 * top:
            tail = eig[i:]
            alpha = 1 + len(tail) / (np.log(tail).sum() - len(tail) * np.log(eig[i]))
            fitted = 1 - (tail / eig[i]) ** (1 - alpha)
            distance = np.abs(fitted - np.arange(len(tail)) / len(tail)).max()
            if distance < best[0]:
                best = (distance, alpha)
    return best[1]


@pytest.mark.parametrize("shape", [(700, 60), (60, 2500), (90, 90), (1100, 600)])
def test_eigenvalues_and_peak_against_plain_definitions(shape):
    weight = heavy(*shape)
    found = eigenvalues(weight)
    expected = torch.linalg.svdvals(weight.double()).square().flip(0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=expected[-1].item() * 1e-13)
    assert peak(expected).item() == pytest.approx(naive_peak(expected.numpy()), abs=1e-9)


def test_invariances():
    weight = heavy(80, 50)
    rotation = torch.linalg.qr(heavy(80, 80).double())[0]
    plain = exponents_of(weight.double())
    for other in (weight.double().T, rotation @ weight.double(), weight.double() / 4):
        found = exponents_of(other)
        for name in ("peak", "median", "hill"):
            assert getattr(found, name) == pytest.approx(getattr(plain, name), abs=1e-6)


def test_tail_of_a_pareto_law():
    """Eigenvalues with density ~ λ^-a have exponent a."""
    generator = torch.Generator().manual_seed(1)
    for a in (2.0, 3.5):
        eig = torch.rand(20_000, generator=generator, dtype=torch.float64).pow(-1 / (a - 1)).sort().values
        assert median(eig).item() == pytest.approx(a, rel=0.03)
        assert hill(eig).item() == pytest.approx(a, rel=0.03)


def test_estimators_take_batches():
    batch = torch.stack([eigenvalues(heavy(64, 64, seed)) for seed in range(6)]).reshape(2, 3, 64)
    for estimate in (peak, median, hill):
        found = estimate(batch)
        assert found.shape == (2, 3)
        torch.testing.assert_close(found[1, 2], estimate(batch[1, 2]), rtol=1e-12, atol=0)


def test_bfloat16_is_read_exactly():
    weight = heavy(64, 96).bfloat16()
    assert exponents_of(weight) == exponents_of(weight.float())


def test_zero_eigenvalues_are_left_out():
    thin = heavy(64, 20).double()
    padded = torch.cat([thin, torch.zeros(64, 30)], 1)
    assert exponents_of(padded).eigenvalues == 20
    assert exponents_of(padded).median == pytest.approx(exponents_of(thin).median)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((32, 32), float("nan")), "NaN or infinite"),
        (torch.eye(32).index_fill(0, torch.tensor([3]), float("inf")), "NaN or infinite"),
        (torch.zeros(32, 32), "zero everywhere"),
        (torch.eye(32), "all singular values are equal"),
        (heavy(32, 4) @ heavy(4, 32), "rank 4 is too small for a tail"),
        (heavy(32, 5), "too small for a tail"),
    ],
)
def test_matrices_without_a_tail(weight, message):
    with pytest.raises(UserError, match=message):
        exponents_of(weight.double())


def test_peak_without_a_candidate_is_zero_as_released():
    """Bins of 0.44 decades: the fullest begins at 10^1.32, its values 10^1.7 exceed 1.5 times that, and 1 < 1.3."""
    eig = torch.tensor([1.0] + [10**1.7] * 20 + [1e44], dtype=torch.float64)
    assert peak(eig).item() == naive_peak(eig.numpy()) == 0
    assert peak(torch.stack([eig, eig.log1p()])).tolist()[0] == 0
