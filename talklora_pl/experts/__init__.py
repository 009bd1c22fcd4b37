"""What can be added to a frozen layer: one file per kind of experts.

A kind is a dataclass of options whose ``build`` makes the module that the layer asks, see
:mod:`talklora_pl.sites.experts`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from talklora_pl.registry import Component, import_siblings
from talklora_pl.sites import Site
from talklora_pl.sites.experts import ExpertsModule, FFNExperts, LinearExperts
from talklora_pl.sites.linear import LINEAR
from talklora_pl.spec import Bank, LayerSpec

__all__ = ["Experts", "ExpertsModule", "FFNExperts", "LinearExperts"]


class Experts(Component):
    """Family of expert kinds.

    Class attributes:
        splits_rank: the experts share one rank, each has a slice of it; else each has the full rank.
            Decides the reference of the scale alpha / rank.
        site: what is adapted, a single Linear unless a kind says otherwise, see :mod:`talklora_pl.sites`.
    """

    family = "experts"
    splits_rank: ClassVar[bool] = False
    site: ClassVar[Site] = LINEAR

    @abstractmethod
    def build(self, layer: LayerSpec, bank: Bank) -> ExpertsModule:
        """The experts of one layer: :class:`LinearExperts` for the site of Linears."""


import_siblings(__name__)
