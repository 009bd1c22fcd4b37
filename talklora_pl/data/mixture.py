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
        self._quotas = [(p, *divmod(int(n), max(len(p), 1))) for p, n in zip(self.parts, self.counts)]

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the rows of an epoch, source by source."""
        random = np.random.default_rng((seed, epoch, 2))
        drawn = []
        for part, whole, rest in self._quotas:
            drawn += [part] * whole + [np.sort(random.permutation(part)[:rest])]
        return np.concatenate(drawn)

    def places(self, length: np.ndarray) -> np.ndarray:
        """The longest that each of the rows may be which :meth:`rows_for_places` draws in any epoch.

        Args:
            length: of each row of the data set.
        """
        out = []
        for part, whole, rest in self._quotas:
            longest_first = -np.sort(-length[part])
            out += [length[part]] * whole + [longest_first[np.arange(rest) * len(part) // max(rest, 1)]]
        return np.concatenate(out)

    def rows_for_places(self, length: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """A row for each of :meth:`places`, in place of :meth:`rows`: so that every epoch is of the same lengths.

        What a source gives beyond all of its rows is every n-th of them, longest first, from a random one on, n being
        its rows per row given (systematic sampling, Madow 1949): each is drawn with the same probability, and all
        places of a source together have room for no more than its longest row beyond what is drawn.
        """
        random = np.random.default_rng((seed, epoch, 2))
        drawn = []
        for part, whole, rest in self._quotas:
            mixed = random.permutation(part)
            longest_first = mixed[np.argsort(-length[mixed], kind="stable")]
            start = random.integers(max(len(part), 1))
            drawn += [part] * whole + [longest_first[(np.arange(rest) * len(part) + start) // max(rest, 1)]]
        return np.concatenate(drawn)
