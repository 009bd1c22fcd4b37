"""What share of an epoch each source has, where it is not that of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from talklora_pl.data.source import Source


def shares(sizes: Sequence[int], weights: Sequence[float] | None, temperature: float | None) -> np.ndarray:
    """The share of each source: by its weight, or by its rows to the power of one over the temperature, as in T5
    (Raffel et al. 2020): 1 leaves the shares as they are, more lets small sources have more of an epoch."""
    raw = np.asarray(sizes, float) ** (1 / (temperature or 1)) if weights is None else np.asarray(weights, float)
    raw = np.where(np.asarray(sizes) > 0, raw, 0)  # all rows of one may be dropped
    return raw / raw.sum()


def shares_of(sources: Sequence[Source], sizes: Sequence[int], temperature: float | None) -> np.ndarray | None:
    """The share of each source, by their weights or the temperature; None: each row once."""
    weights = [source.weight for source in sources if source.weight is not None]
    return shares(sizes, weights or None, temperature) if weights or temperature is not None else None


def counts(rows: int, share: np.ndarray) -> np.ndarray:
    """Whole numbers of rows that add up to `rows`, each less than one off its share (largest remainders)."""
    exact = share * rows
    out = np.floor(exact).astype(int)
    out[np.argsort(out - exact, kind="stable")[: rows - out.sum()]] += 1
    return out


class Mixture:
    """Draws the rows of an epoch from several sources: a function of seed and epoch, so that a run resumes.

    An epoch has as many rows as all sources together. A source that gives more rows than it has gives each of them
    equally often, up to one time; one that gives less gives others in every epoch.

    Args:
        source_of: of each row of the data set, the number of its source.
        share: of each source.
    """

    def __init__(self, source_of: np.ndarray, share: np.ndarray) -> None:
        self.parts = [np.flatnonzero(source_of == i) for i in range(len(share))]
        self.counts = counts(len(source_of), share)

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the rows of an epoch, source by source."""
        random = np.random.default_rng((seed, epoch, 2))
        drawn = []
        for part, count in zip(self.parts, self.counts):
            whole, rest = divmod(int(count), max(len(part), 1))
            drawn += [part] * whole + [np.sort(random.permutation(part)[:rest])]
        return np.concatenate(drawn)
