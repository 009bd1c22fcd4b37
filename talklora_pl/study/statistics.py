"""What a difference of scores is worth: paired over questions and seeds.

M methods, S seeds, Q questions; x_SQ a score of every question under every seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

DRAWS = 4000
POWER_Z = 0.8416 + 1.9600
"""z of 80 % power plus z of a two-sided test at 5 %."""


@dataclass(frozen=True)
class Difference:
    """Of a method from the baseline.

    Attributes:
        mean: of the paired differences.
        low, high: 95 % bootstrap interval over seeds and questions.
        detectable: the smallest true difference that a study of this size sees in four cases of five.
    """

    mean: float
    low: float
    high: float
    detectable: float

    @property
    def seen(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def verdict(self, margin: float = 0.0) -> str:
        """In words; below the margin the two count as the same."""
        if self.seen:
            return "higher" if self.mean > 0 else "lower"
        return "the same" if margin and -margin < self.low and self.high < margin else "no difference seen"


def spread(x_SQ: Array) -> tuple[float, float]:
    """Mean over questions and seeds, and the standard deviation over seeds (n - 1); nan with a single seed."""
    mean_S = x_SQ.mean(1)
    return float(mean_S.mean()), float(mean_S.std(ddof=1)) if len(mean_S) > 1 else float("nan")


def paired(x_SQ: Array, baseline_SQ: Array, draws: int = DRAWS, seed: int = 0) -> Difference:
    """How a method differs from the baseline on the same questions with the same seeds.

    Seeds and questions are drawn with replacement, independently of each other (two-way bootstrap, Owen 2007): a mean
    over few seeds is uncertain however many questions there are. A draw of S seeds spreads by (S-1)/S too little; its
    deviations from the mean are widened by sqrt(S/(S-1)). With a single seed only questions are drawn, and what another
    seed would have given is not in the interval.
    """
    d_SQ = x_SQ - baseline_SQ
    S, Q = d_SQ.shape
    draw = np.random.default_rng(seed)
    mean_S, mean = d_SQ.mean(1), d_SQ.mean()
    # the effect of a seed, widened; the rest stays as it is
    wide_SQ = d_SQ + (mean_S - mean)[:, None] * (np.sqrt(S / (S - 1)) - 1 if S > 1 else 0.0)
    means = np.empty(draws)
    for i in range(draws):
        of_Q = np.bincount(draw.integers(0, Q, Q), minlength=Q)
        of_S = np.bincount(draw.integers(0, S, S), minlength=S)
        means[i] = of_S @ wide_SQ @ of_Q / (S * Q)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(mean), float(low), float(high), float(POWER_Z * means.std()))
