"""What multiplies the tokens of one adapted Linear: a function of its parameters alone.

D input width, O output width, E experts, M rows of the down product, Q rows of the up projection.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from talklora_pl.internals.torch import in_backward, version
from talklora_pl.sites.fused import scaled

Way = Literal["uniform", "folded", "weighed", "plain"]
"""The same for all tokens; all that is linear in one product; one part of the method after the other, but for the core,
or with it."""


class Matrices(NamedTuple):
    """What multiplies the tokens of one layer.

    Attributes:
        down_MD: rows of the down projection, then those of the scores, if they are among them.
        up_QO: up projections, before ``scale``.
        scores: how many of the rows are of scores.
        bias_E: of the scores.
        whole: how many of the rows multiply what dropout leaves as it is.
    """

    down_MD: Tensor
    up_QO: Tensor
    scale: float
    scores: int = 0
    bias_E: Tensor | None = None
    whole: int = 0

    def ready(self, dtype: torch.dtype, fused: bool = True) -> Matrices:
        """Cast, and multiplied by the scale; ``fused`` as in :meth:`AdaptedLinear.matrices`."""
        up_QO = scaled(self.up_QO, self.scale, dtype) if fused else (self.up_QO * self.scale).to(dtype)
        return self._replace(down_MD=self.down_MD.to(dtype), up_QO=up_QO, scale=1.0)


class Pass:
    """A forward pass of the model.

    Attributes:
        under_way: it has not ended.
    """

    under_way = True


class Made:
    """Matrices that were made for one layer when a forward pass began, see :mod:`talklora_pl.sites.together`."""

    def __init__(self, during: Pass, way: Way, matrices: Matrices, sources: list[Tensor]) -> None:
        self.during = during
        self.way = way
        self.matrices = matrices
        self.sources = sources
        # no stamps, which ask for a place in memory: a pass that only works out shapes has none
        self.versions = [version(t) for t in sources]

    def fits(self, way: Way, dtype: torch.dtype, sources: list[Tensor]) -> bool:
        """Whether these are what the layer would make now from ``sources``."""
        if way != self.way or dtype != self.matrices.down_MD.dtype or not torch.is_grad_enabled():
            return False
        if not in_backward():
            return self.during.under_way
        # a checkpoint's second pass may come after another forward pass has begun: values alone count then
        known = zip(self.sources, self.versions, strict=True)
        return all(t is k and version(t) == v for t, (k, v) in zip(sources, known, strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer has none
