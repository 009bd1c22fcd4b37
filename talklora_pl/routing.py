"""Routing is observed, not stored: a layer hands its routing to a collector of its adapter, inside of its context only.

T tokens, E experts, K selected experts.

Outside of the context nothing is kept, so a layer that gradient checkpointing runs a second time is recorded once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from talklora_pl.errors import UserError
from talklora_pl.names import ADAPTERS


class Routing(NamedTuple):
    """What a router decides for T tokens.

    Attributes:
        weights_TE: after selection and renormalisation; rows sum to 1.
        probs_TE: before selection.
        logits_TE: scores behind the probabilities.
        selected_TK: indices of the selected experts, best first; None for dense routers.
    """

    weights_TE: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    selected_TK: Tensor | None = None


class PackedRows(NamedTuple):
    """Which row of a packed batch every token belongs to: ``row_T`` from 0, of ``rows`` rows.

    In a step that is recorded (:mod:`talklora_pl.captured`) nobody knows how many rows those that replay it will have.
    """

    row_T: Tensor
    rows: int | None


@dataclass
class RoutingRecord:
    """One layer's routing in one forward pass.

    Attributes:
        layer: full name of the module that decided.
        mask_T: False for pads.
        shape: of the tokens before they were flattened, usually (batch, sequence).
        task_types_B: kind of task of every row of the batch, where the data says so.
        packed: rows of every token, where they follow each other without pads.
    """

    layer: str
    routing: Routing
    mask_T: Tensor
    shape: tuple[int, ...] = ()
    task_types_B: Tensor | None = None
    packed: PackedRows | None = None

    def sum_by_row(self, values_TE: Tensor) -> Tensor:
        """Sums over the real tokens of every row of the batch, (B,E).

        Raises:
            UserError: of a packed batch in a step that is recorded.
        """
        values_TE = values_TE * self.mask_T.unsqueeze(-1)
        if self.packed is None:
            return values_TE.view(self.shape[0], -1, values_TE.shape[-1]).sum(1)
        if self.packed.rows is None:
            raise UserError("a balance loss asks for the rows of a packed batch, whose number changes")
        sums_BE = values_TE.new_zeros(self.packed.rows, values_TE.shape[-1])
        return sums_BE.index_add(0, self.packed.row_T, values_TE)

    def sum_of(self, values: Tensor) -> Tensor:
        """Sum of (T, ...) over the real tokens."""
        if values.dim() == 1:
            return (self.mask_T * values).sum()
        flat = self.mask_T.to(values.dtype) @ values.flatten(1)
        return flat.view(values.shape[1:])

    def weight_share(self) -> Tensor:
        """Mean weight of every expert over the real tokens, shape (E,); sums to 1."""
        m_T = self.mask_T.to(self.routing.weights_TE.dtype)
        return (m_T @ self.routing.weights_TE) / m_T.sum().clamp(min=1)

    def chosen(self) -> Tensor:
        """Indices of the selected experts, best first, (T,K); dense routers: the top-1, K = 1."""
        chosen_TK = self.routing.selected_TK
        return self.routing.probs_TE.argmax(-1, keepdim=True) if chosen_TK is None else chosen_TK

    def selections(self) -> Tensor:
        """How many real tokens have every expert as their k-th choice, (K, E)."""
        chosen_TK = self.chosen()
        K, E = chosen_TK.shape[1], self.routing.probs_TE.shape[1]
        flat_TK = chosen_TK + E * torch.arange(K, device=chosen_TK.device)
        mask_TK = self.mask_T.float().unsqueeze(1).expand(-1, K)
        counts = torch.zeros(K * E, device=chosen_TK.device)
        return counts.index_add_(0, flat_TK.reshape(-1), mask_TK.reshape(-1)).view(K, E)

    def selection_share(self) -> Tensor:
        """Share of all selections that went to every expert, shape (E,); dense routers: top-1 choices."""
        counts_E = self.selections().sum(0)
        return counts_E / counts_E.sum().clamp(min=1)


class Handed:
    """Where compiled code leaves the routing of a layer; what appends to a list would be compiled anew every time."""

    routing: Routing | None = None


class Collectors(list["RoutingCollector"]):
    """Open collectors of one adapter, innermost last.

    Attributes:
        handed: of every layer of the adapter, by name.
        advice: what a training loop without a collector has to be told; empty if nothing is lost in it.
    """

    advice = ""

    def __init__(self) -> None:
        super().__init__()
        self.handed: dict[str, Handed] = {}

    def take_handed(self) -> dict[str, Routing]:
        """What compiled layers have left since the last time, by name."""
        taken = {name: handed.routing for name, handed in self.handed.items() if handed.routing is not None}
        for name in taken:
            self.handed[name].routing = None
        return taken

    def give_advice(self) -> None:
        """Once per adapter."""
        warnings.warn(self.advice, stacklevel=2)
        self.advice = ""


class RoutingCollector:
    """Collects the routing of every layer of one model that runs inside ``with RoutingCollector(model) as collector:``.

    It hangs on the model's adapters, so that two models that run in turn keep their records apart. Of nested
    collectors of one model only the innermost collects.

    Args:
        model: a model with adapters, or one of its adapters.
        mask: attention mask (batch, sequence) of the forward pass; 0 marks pads.
        task_types: kind of task of every row (batch,), for losses that ask for it.
        packed: the rows of a batch that is packed, see :func:`talklora_pl.inputs.packed_rows`.

    Attributes:
        records: what was collected, in the order in which the layers ran; that of compiled layers, in the order of the
            model, when the context ends.

    Raises:
        UserError: on entering, the model has no adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Tensor | None = None,
        task_types: Tensor | None = None,
        packed: PackedRows | None = None,
    ) -> None:
        self.model = model
        self.packed = packed
        self._real = None if mask is None else mask.bool()  # once for all layers
        self.task_types = task_types
        self.records: list[RoutingRecord] = []
        self._stacks: list[Collectors] = []

    def __enter__(self) -> RoutingCollector:
        adapters: Any = getattr(self.model, ADAPTERS, None)
        found: list[Any] = [self.model] if adapters is None else list(adapters.values())
        self._stacks = [adapter.collectors for adapter in found if hasattr(adapter, "collectors")]
        if not self._stacks:
            raise UserError(f"This {type(self.model).__name__} has no adapter whose routing could be collected.")
        for stack in self._stacks:
            stack.take_handed()  # of layers that were run again for their gradients
            stack.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        for stack in self._stacks:
            for layer, routing in stack.take_handed().items():
                self.add(layer, routing, routing.weights_TE.shape[:1])
                stack.advice = ""
            stack.remove(self)

    def add(self, layer: str, routing: Routing, leading_shape: torch.Size) -> None:
        # by number, not by shape: some models flatten (batch, sequence) before their feed-forward Linears (OPT)
        if self._real is not None and self._real.numel() == routing.weights_TE.shape[0]:
            mask_T, leading_shape, packed = self._real.reshape(-1), self._real.shape, self.packed
        else:  # a layer that does not see one row per token, such as a pooler
            packed = None
            mask_T = torch.ones(routing.weights_TE.shape[0], dtype=torch.bool, device=routing.weights_TE.device)
        self.records.append(RoutingRecord(layer, routing, mask_T, tuple(leading_shape), self.task_types, packed))
