"""Intervals of paired differences, against what they are to cover."""

from __future__ import annotations

import numpy as np
import pytest

from talklora_pl.study.statistics import paired, spread


def test_spread_is_over_seeds() -> None:
    x_SQ = np.array([[1.0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    mean, sd = spread(x_SQ)
    assert mean == pytest.approx(0.75) and sd == pytest.approx(np.std([0.75, 0.5, 1.0], ddof=1))
    assert np.isnan(spread(x_SQ[:1])[1])


def test_one_seed_and_many_questions_give_the_paired_interval() -> None:
    """With one seed the interval is that of the mean of Q paired differences."""
    draw = np.random.default_rng(0)
    x_SQ, y_SQ = (draw.random((1, 2000)) < p for p in (0.6, 0.5))
    d = paired(x_SQ.astype(float), y_SQ.astype(float))
    error = (x_SQ.astype(float) - y_SQ).std() / np.sqrt(2000)
    assert d.mean == pytest.approx(x_SQ.mean() - y_SQ.mean())
    assert (d.high - d.low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert d.detectable == pytest.approx(2.8 * error, rel=0.06)
    assert d.seen and d.verdict() == "higher"


def test_no_difference_is_no_difference() -> None:
    x_SQ = (np.random.default_rng(0).random((3, 50)) < 0.5).astype(float)
    d = paired(x_SQ, x_SQ)
    assert (d.mean, d.low, d.high) == (0, 0, 0) and d.verdict() == "no difference seen"
    assert d.verdict(margin=0.01) == "the same"


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_the_true_difference(seeds: int) -> None:
    """Seeds and questions both have an effect on the difference; nineteen of twenty intervals are to cover the truth.

    Few seeds are few: with three of them the interval covers less often than it says, but not by much.
    """
    draw, covered, truth, trials = np.random.default_rng(1), 0, 0.1, 200
    for trial in range(trials):
        d_SQ = truth + 0.03 * draw.normal(size=(seeds, 1)) + 0.4 * draw.normal(size=(1, 150))
        d_SQ = d_SQ + 0.5 * draw.normal(size=d_SQ.shape)
        d = paired(d_SQ, np.zeros_like(d_SQ), draws=400, seed=trial)
        covered += d.low <= truth <= d.high
    assert covered / trials >= 0.93
