r"""Power-law exponent of the eigenvalue tail of WᵀW: the quality metric behind AlphaLoRA.

Legend: W weight [m, n]; N = min(m, n); λ_1 ≤ ... ≤ λ_N eigenvalues of the smaller Gram matrix, that is the squared
singular values.
A tail that starts at λ_i and holds M = N - i + 1 values has the maximum-likelihood (Hill) exponent

    α_i = 1 + M / Σ_{j≥i} ln(λ_j / λ_i)

and the three estimators differ in where the tail starts. They take any leading batch dimensions: λ [..., N] -> α [...].
A smaller α means a heavier tail, which the method reads as a better trained layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from talklora_pl.errors import UserError

MIN_EIGENVALUES = 8
"""Fewer make no tail: an upper half of four values is the least that is estimated from."""
_BLOCK = 1024  # rows that are float64 at a time
_STRIP = 512  # columns of the Gram matrix made at a time
_PAIRS = 1 << 20  # (start, value) pairs of the peak search held at a time: 8 MB


def eigenvalues(weight: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Squared singular values of ``weight`` [m, n], ascending, float64 [N].

    By the smaller Gram matrix in float64, summed over blocks of ``weight``, which is never copied as a whole. This is
    faster than singular values in float32 and closer to those in float64 (docs/allocation.md); in float32 the Gram
    matrix would lose the small eigenvalues.
    """
    if weight.shape[0] < weight.shape[1]:
        weight = weight.T
    N = weight.shape[1]
    gram_NN = torch.zeros(N, N, dtype=torch.float64, device=device)
    for rows in weight.split(_BLOCK):
        rows = rows.to(device=gram_NN.device, dtype=torch.float64)
        for i in range(0, N, _STRIP):  # the lower triangle is enough
            gram_NN[i:, i : i + _STRIP].addmm_(rows[:, i:].T, rows[:, i : i + _STRIP])
    if not gram_NN.diagonal().isfinite().all():
        raise UserError("the weight contains NaN or infinite values.")
    eig_N: Tensor = torch.linalg.eigvalsh(gram_NN, UPLO="L").cpu()
    return eig_N


def resolved(eigenvalues_N: Tensor) -> Tensor:
    """Drop the eigenvalues that are zero up to rounding (rank-deficient weights): their logarithms would be noise.

    Raises:
        UserError: what is left has no tail.
    """
    largest = eigenvalues_N[-1].item()
    if not largest > 0:
        raise UserError("the weight is zero everywhere.")
    floor = largest * len(eigenvalues_N) * torch.finfo(torch.float64).eps
    kept = eigenvalues_N[eigenvalues_N > floor]
    if len(kept) < MIN_EIGENVALUES:
        raise UserError(
            f"rank {len(kept)} is too small for a tail: at least {MIN_EIGENVALUES} non-zero singular values are needed."
        )
    if kept[-1] / kept[0] < 1 + 1e-6:
        raise UserError("all singular values are equal: there is no tail.")
    return kept


def _tail_exponents(log_N: Tensor) -> Tensor:
    """α_i for every start i [..., N]; the last is infinite."""
    size = log_N.shape[-1] - torch.arange(log_N.shape[-1])
    return 1 + size / (log_N.flip(-1).cumsum(-1).flip(-1) - size * log_N)


def median(eigenvalues_N: Tensor) -> Tensor:
    """Tail from index ⌊N/2⌋ (from 0); the start itself is counted (TempBalance's default)."""
    log_N = eigenvalues_N.double().log()
    return _tail_exponents(log_N)[..., log_N.shape[-1] // 2]


def hill(eigenvalues_N: Tensor) -> Tensor:
    """Textbook Hill estimate: 1 + k / Σ ln(λ / λ_{N-k}) over the k = ⌊N/2⌋ values above λ_{N-k}."""
    log_N = eigenvalues_N.double().log()
    k = log_N.shape[-1] // 2
    return 1 + k / (log_N[..., -k:] - log_N[..., -k - 1, None]).sum(-1)


def peak(eigenvalues_N: Tensor) -> Tensor:
    """Tail that fits best among the starts near the peak of the spectrum: the estimator of the released AlphaLoRA code.

    Peak: left edge of the fullest of 100 equal bins of log10 λ. Candidates: log10(0.95 peak) ≤ λ_i ≤ 1.5 peak, i < N
    (the lower bound compares a logarithm with a raw eigenvalue, a slip of the released code which is kept, since it is
    what produced the published numbers). Chosen: the smallest Kolmogorov-Smirnov distance

        D_i = max_{k=0..M-1} |1 - (λ_{i+k}/λ_i)^{1-α_i} - k/M|

    the lowest i on a tie. Without a candidate the result is 0, as released.
    """
    eig_N = eigenvalues_N.double()
    shape, N = eig_N.shape[:-1], eig_N.shape[-1]
    eig_BN = eig_N.reshape(-1, N)
    log_BN = eig_BN.log()

    log10_BN = eig_BN.log10()
    low_B1, high_B1 = log10_BN[:, :1], log10_BN[:, -1:]
    bin_BN = ((log10_BN - low_B1) / (high_B1 - low_B1) * 100).long().clamp(0, 99)
    counts_B100 = torch.zeros(len(eig_BN), 100).scatter_add_(1, bin_BN, torch.ones(eig_BN.shape))
    fullest_B1 = counts_B100.argmax(1, keepdim=True)
    peak_B1 = 10 ** (low_B1 + (high_B1 - low_B1) * fullest_B1 / 100)

    candidate_BN = (eig_BN >= (0.95 * peak_B1).log10()) & (eig_BN <= 1.5 * peak_B1)
    candidate_BN[:, -1] = False
    alpha_BN = _tail_exponents(log_BN)
    distance_BN = torch.full_like(eig_BN, math.inf)
    rows = max(1, _PAIRS // eig_BN.numel())
    wanted = candidate_BN.any(0).nonzero()
    first, stop = (int(wanted[0]), int(wanted[-1]) + 1) if len(wanted) else (0, 0)
    for i in range(first, stop, rows):
        start = torch.arange(i, min(i + rows, stop))
        after = torch.arange(i, N) - start[:, None]  # k, negative before the start
        size = N - start[:, None]
        ratio = log_BN[:, None, i:] - log_BN[:, start, None]
        gap = (1 - torch.exp((1 - alpha_BN[:, start, None]) * ratio) - after / size).abs()
        distance_BN[:, start] = gap.masked_fill(after < 0, 0).amax(-1)
    distance_BN = distance_BN.masked_fill(~candidate_BN, math.inf)
    best_B1 = distance_BN.argmin(1, keepdim=True)
    found = candidate_BN.any(1)
    return torch.where(found, alpha_BN.gather(1, best_B1).squeeze(1), 0.0).reshape(shape)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"peak": peak, "median": median, "hill": hill}


@dataclass(frozen=True)
class Exponents:
    """The three exponents of one matrix; the eigenvalues cost nearly all of the time, so all are always taken.

    Attributes:
        eigenvalues: how many are not zero.
    """

    peak: float
    median: float
    hill: float
    rows: int
    columns: int
    eigenvalues: int


def exponents_of(weight: Tensor, device: torch.device | str | None = None) -> Exponents:
    """Exponents of one weight [m, n].

    Raises:
        UserError: NaN, a zero matrix, too small a rank, a flat spectrum.
    """
    if min(weight.shape) < MIN_EIGENVALUES:
        raise UserError(
            f"shape {list(weight.shape)} is too small for a tail: {MIN_EIGENVALUES} rows and columns are needed."
        )
    eig_N = resolved(eigenvalues(weight, device))
    values = {name: estimate(eig_N).item() for name, estimate in ESTIMATORS.items()}
    return Exponents(**values, rows=weight.shape[0], columns=weight.shape[1], eigenvalues=len(eig_N))


def mean(values: Iterable[float]) -> float:
    """Unweighted mean (the layer metric of the released code)."""
    values = list(values)
    return math.fsum(values) / len(values)
