"""Who is linked to whom: symmetric expert graphs without self loops, as dense (E,E) matrices.

T tokens, E experts, F features, P = E(E-1)/2 pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def from_pairs(pair_P: Tensor, E: int) -> Tensor:
    """(..., P) values of the pairs i < j, row by row -> symmetric (..., E, E) with zero diagonal."""
    i, j = torch.triu_indices(E, E, offset=1, device=pair_P.device)
    a = pair_P.new_zeros(*pair_P.shape[:-1], E, E)
    a[..., i, j] = pair_P
    return a + a.transpose(-1, -2)


def pairs_of(density: float, E: int) -> int:
    """Number of edges: ``density`` is edges over pairs."""
    return round(density * (E * (E - 1) // 2))


def complete(E: int) -> Tensor:
    """Every expert is linked to every other."""
    return 1 - torch.eye(E)


def ring(E: int) -> Tensor:
    """Every expert is linked to two neighbours."""
    a = torch.zeros(E, E)
    for i in range(E if E > 1 else 0):
        a[i, (i + 1) % E] = a[(i + 1) % E, i] = 1
    return a


def random(E: int, density: float) -> Tensor:
    """A random choice of round(density P) pairs, from the current seed."""
    pair_P = torch.zeros(E * (E - 1) // 2)
    pair_P[torch.randperm(len(pair_P))[: pairs_of(density, E)]] = 1
    return from_pairs(pair_P, E)


def cosines(v_EF: Tensor) -> Tensor:
    """|cos| between the rows of (..., E, F) -> (..., E, E)."""
    n_EF = F.normalize(v_EF, dim=-1)
    return (n_EF @ n_EF.transpose(-1, -2)).abs()


def similar(v_EF: Tensor, density: float) -> Tensor:
    """The round(density P) pairs of largest |cos|, with edges of weight 1."""
    return (strongest(cosines(v_EF), density) > 0).to(v_EF.dtype)


def strongest(sim_EE: Tensor, density: float) -> Tensor:
    """(..., E, E): the round(density P) largest of the pairs keep their value, the others and the diagonal are 0."""
    E = sim_EE.shape[-1]
    i, j = torch.triu_indices(E, E, offset=1, device=sim_EE.device)
    pair_P = sim_EE[..., i, j]
    kept = pair_P.topk(pairs_of(density, E), dim=-1).indices
    return from_pairs(torch.zeros_like(pair_P).scatter(-1, kept, pair_P.gather(-1, kept)), E)


def similar_published(v_EF: Tensor, density: float) -> Tensor:
    """GMoE's construction: lower a threshold from 1 in steps of 0.01 until a share ``density`` of |cos| is above it.

    The share is that of all E² entries, so the diagonal counts: 8 experts have no edge at all below 0.125.
    """
    sim_EE = cosines(v_EF)
    # rounding must not hide the diagonal from the first threshold
    sim_EE.fill_diagonal_(1.0)
    step = 100
    while step > 0 and (sim_EE >= step / 100).to(torch.float32).mean() < density:
        step -= 1
    return (sim_EE >= step / 100).to(v_EF.dtype).fill_diagonal_(0)
