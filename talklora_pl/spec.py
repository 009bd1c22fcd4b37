"""What a component may know of the place it is built for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LayerSpec:
    """One adapted layer: widths of the frozen layer, size of its mixture, and where its tensors live.

    Attributes:
        name: full module name in the base model, ``model.layers.3.self_attn.q_proj``.
        kind: key of what layers may share: exact leaf name and shape, ``q_proj-576x576``.
        index: number of the decoder layer, or None outside of the numbered layers.
        num_layers: how many decoder layers the stack has that this one is in.
        in_features: D.
        out_features: O.
        num_experts: E, experts of this layer.
        kind_experts: the largest E among the layers of this kind.
        rank: R, rank of one expert.
        hidden_features: width between the two projections of a feed-forward block; 0 for a single Linear.
        communicates: the experts communicate.
        uses_features: someone uses the features of the experts.
        device, dtype: of the trained tensors.
    """

    name: str
    kind: str
    index: int | None
    in_features: int
    out_features: int
    num_experts: int
    kind_experts: int
    rank: int
    hidden_features: int = 0
    num_layers: int = 0
    communicates: bool = False
    uses_features: bool = False
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32

    def uniform(self, *shape: int, fan_in: int) -> nn.Parameter:
        """A trained tensor drawn from U(±1/sqrt(fan_in)): what ``kaiming_uniform_(a=sqrt 5)`` amounts to."""
        return self.drawn(shape, lambda p: p.uniform_(-(fan_in**-0.5), fan_in**-0.5))

    def glorot(self, *shape: int, gain: float = 1.0) -> nn.Parameter:
        """A trained matrix drawn from U(±gain sqrt(6 / (rows + columns)))."""
        bound = gain * (6 / sum(shape)) ** 0.5
        return self.drawn(shape, lambda p: p.uniform_(-bound, bound))

    def normal(self, *shape: int, std: float) -> nn.Parameter:
        """A trained tensor drawn from N(0, std²)."""
        return self.drawn(shape, lambda p: p.normal_(0, std))

    def drawn(self, shape: tuple[int, ...], draw: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """A trained tensor that ``draw`` fills: in main memory, so that training starts equally on every device."""
        place = self.device if self.device is not None and self.device.type == "meta" else "cpu"
        return nn.Parameter(draw(torch.empty(shape, device=place, dtype=self.dtype)).to(device=self.device))

    def zeros(self, *shape: int) -> nn.Parameter:
        """A trained tensor that starts at zero."""
        return nn.Parameter(torch.zeros(shape, device=self.device, dtype=self.dtype))


def unregistered(module: M) -> tuple[M]:
    """A module to keep in an attribute of another module that does not own it.

    As an attribute itself it would be registered again: twice in the state dict, under two names. A module does not
    look into tuples.
    """
    return (module,)


class Bank(nn.Module):
    """Tensors that all layers of one kind share (TalkLoRA's B). Only the bank registers them.

    So a shared tensor is once in ``parameters()`` and once in a file. Its name is ``bank.<kind>.<tensor>``.
    """

    def shared(self, kind: str, tensor: str, make: nn.Parameter) -> nn.Module:
        """The holder whose attribute ``tensor`` is shared by all layers of ``kind``; made by the first of them."""
        key = kind.replace(".", "_")
        if key not in self._modules:
            self.add_module(key, nn.Module())
        holder = self._modules[key]
        assert holder is not None
        if tensor not in holder._parameters:
            holder.register_parameter(tensor, make)
        elif getattr(holder, tensor).shape != make.shape:
            raise ValueError(
                f"{kind}: shared {tensor} has shape {tuple(getattr(holder, tensor).shape)}, not {tuple(make.shape)}"
            )
        return holder


class LayerOptions(Protocol):
    """What a site's layer reads of the options, see :class:`~talklora_pl.adapter.config.AdapterConfig`."""

    experts: Any
    communication: Any
    router: Any
    num_experts: int
    experts_see_talk: bool
    dropout_input: float
    dropout_routing: float
    dropout_output: float

    def scale(self) -> float:
        """s, the factor of the experts' output."""
