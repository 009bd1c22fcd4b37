"""Which loads do we want: one file per auxiliary loss.

T tokens, E experts, K selected experts, G groups of decisions whose statistics are one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from talklora_pl.errors import UserError
from talklora_pl.names import decoder_layer
from talklora_pl.ranks import sum_over_ranks
from talklora_pl.registry import Component, import_siblings
from talklora_pl.routing import RoutingRecord

Scope = Literal["router", "layer", "model"]


class BalanceLoss(nn.Module):
    """One auxiliary loss over the routing of all layers. Its parameters and buffers are saved with the adapter.

    A child defines :meth:`statistics` and :meth:`value`. In between, pads are left out and processes summed, so value
    and gradient are those of the whole batch. A loss whose statistics are no sums over tokens, or that keeps counts
    of its own, overrides :meth:`forward` and sees to both itself.

    Args:
        layers: number of experts of every routed layer, by name.
        options: with their ``scope``.

    Attributes:
        experts: number of experts of every group of decisions that share their statistics, by name of the group.
        group: name of the group of every routed layer.

    Raises:
        UserError: a group has layers with unequal numbers of experts.
    """

    def __init__(self, layers: Mapping[str, int], options: Balance) -> None:
        super().__init__()
        self.scope = options.scope
        self.experts: dict[str, int] = {}
        self.group = {name: self.group_of(name) for name in layers}
        for name, E in layers.items():
            if self.experts.setdefault(self.group[name], E) != E:
                raise UserError(
                    f"balance loss {options.name!r}: scope {self.scope!r} puts layers with unequal numbers of experts "
                    f"together ({name!r} has {E}, others {self.experts[self.group[name]]}); use a narrower scope."
                )

    def group_of(self, layer: str) -> str:
        """The group that a layer belongs to: itself, its numbered layer (``model.layers.3``), or the one of all."""
        if self.scope == "model":
            return "model"
        return layer if self.scope == "router" else decoder_layer(layer) or layer

    def grouped(self, records: Sequence[RoutingRecord]) -> dict[str, list[RoutingRecord]]:
        """Records of routed layers by group, in the order of ``experts``."""
        out: dict[str, list[RoutingRecord]] = {group: [] for group in self.experts}
        for r in records:
            if r.layer in self.group:  # plain LoRA beside the mixture decides nothing
                out[self.group[r.layer]].append(r)
        return {group: rs for group, rs in out.items() if rs}

    def statistics(self, record: RoutingRecord) -> tuple[Tensor, ...]:
        """What :meth:`value` needs the sums of, for every token of one layer: tensors (T, ...), pads among them."""
        raise NotImplementedError  # each loss defines it

    def value(self, tokens: Tensor, *sums: Tensor) -> Tensor:
        """The loss of one group (scalar).

        Args:
            tokens: number of real tokens, summed over the layers of the group and all processes (scalar).
            sums: of each of the :meth:`statistics`, over the same.
        """
        raise NotImplementedError  # each loss defines it

    def total(self, values_G: Tensor) -> Tensor:
        """The loss from the :meth:`value` of every group: their sum."""
        return values_G.sum()

    def forward(self, records: Sequence[RoutingRecord]) -> Tensor:
        """The loss (scalar, unweighted) of one micro-step; statistics span all ranks and leave out pads."""
        groups = [self._sums(group) for group in self.grouped(records).values()]
        summed = iter(sum_over_ranks(*(s for sums in groups for s in sums)))
        return self.total(torch.stack([self.value(*(next(summed) for _ in sums)) for sums in groups]))

    def _sums(self, group: list[RoutingRecord]) -> list[Tensor]:
        """Number of real tokens and sums of the statistics over all layers of a group, in this process."""
        each = [(r.mask_T.sum(), *(r.sum_of(x) for x in self.statistics(r))) for r in group]
        return [torch.stack(layers).sum(0) for layers in zip(*each, strict=True)]


@dataclass
class Balance(Component):
    """Family of balance losses.

    Attributes:
        weight: coefficient of the loss.
        scope: whose statistics are pooled: those of every ``router`` alone, of all routers of a numbered ``layer``, or
            of the whole ``model``.
    """

    family = "balance loss"
    weight: float = 0.01
    scope: Scope = "layer"

    def counts(self, num_experts: int) -> bool:
        """Whether a layer of so many experts enters the loss; one expert has nothing to balance."""
        return num_experts > 1

    @abstractmethod
    def build(self, layers: Mapping[str, int]) -> BalanceLoss:
        """The loss of one model, given the number of experts of every routed layer by name."""


def balance_losses(adapter: Any, records: Sequence[RoutingRecord]) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the balance losses of an adapter, and each by name without its weight: scalars.

    Raises:
        UserError: nothing was collected.
    """
    if not adapter.config.balance:
        return torch.zeros(()), {}
    if not records:
        raise UserError(
            "There is no routing to balance: run the model inside of `with RoutingCollector(model, attention_mask)`."
        )
    device = records[0].routing.weights_TE.device
    total, each = torch.zeros((), device=device), {}
    with torch.autocast(device.type, enabled=False):  # sums over tokens need more than bf16's 8 bits
        for options in adapter.config.balance:
            loss = adapter.balance[options.name]
            each[options.name] = loss([r for r in records if r.layer in loss.group])
            total = total + options.weight * each[options.name]
    return total, each


import_siblings(__name__)
