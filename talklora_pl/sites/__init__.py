"""Where experts can be put in a model: one file per kind of place.

A site finds modules of its kind, measures them, and makes the layer that runs in their place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor, nn

from talklora_pl.spec import Bank, LayerOptions, LayerSpec

if TYPE_CHECKING:
    from talklora_pl.sites.mixture import BlockMixture, Mixture


class LowRank(NamedTuple):
    """A fixed change of one Linear, y += x Aᵀ B; of the base's fused experts one for each of them, stacked."""

    A_PD: Tensor
    B_PO: Tensor


class Site(ABC):
    """A kind of module that experts adapt.

    Class attributes:
        in_blocks: its modules lie in blocks that can decide for all of them (``router.per: block``).
        nonlinear: what several experts are together, where their mean is no low-rank change; else empty.
    """

    in_blocks: ClassVar[bool] = False
    nonlinear: ClassVar[str] = ""

    @abstractmethod
    def find(
        self,
        model: nn.Module,
        targets: list[str] | str,
        exclude: list[str] | str,
        layers: list[int] | str | None,
        keep: Container[str] = (),
    ) -> dict[str, nn.Module]:
        """The modules to adapt, by full name, in model order.

        Options as in :func:`~talklora_pl.sites.targets.find_targets`.

        Args:
            keep: modules to adapt even if the model does not run through them on a text, as earlier versions did.

        Raises:
            UserError: the targets match nothing, or something else than modules of this kind.
        """

    @abstractmethod
    def widths(self, module: nn.Module) -> tuple[int, ...]:
        """(D, O) of a module, or (D, H, O) with the width between its two projections."""

    @abstractmethod
    def build(
        self, spec: LayerSpec, config: LayerOptions, bank: Bank, module: nn.Module, block: BlockMixture | None
    ) -> Mixture:
        """The adapter layer of ``module``.

        Args:
            block: decides for the layer, with ``router.per: block``.

        Raises:
            UserError: options that do not go with this site.
        """

    @abstractmethod
    def low_rank(self, name: str, layer: nn.Module, w_E: Tensor) -> dict[str, LowRank]:
        """What a layer of this site adds to the Linears at or in the module ``name``, if its weights are ``w_E``.

        The keys are names of Linears, or of parameters where the change is that of fused experts.
        """
