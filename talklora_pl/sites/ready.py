"""Token by token without gradients: what a layer would find out for every token is found out once.

For one token the arithmetic of a small Linear takes less time than the questions before it: which way, with which
matrices, in which dtype, is anybody watching. The answers hold until something changes. A forward pass of the model
begins by looking whether anything has, for all layers in a row; within it they take what they know. Layers that are
called by themselves, with gradients, under autocast or in training mode ask every time.

T tokens, D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from talklora_pl.internals.torch import is_as_stamped, stamp
from talklora_pl.sites.folding import is_watched
from talklora_pl.sites.fused import FEW, plain_weight, used_dtype
from talklora_pl.sites.matrices import Matrices, Way

if TYPE_CHECKING:
    from talklora_pl.sites.linear import AdaptedLinear


class Ready(NamedTuple):
    """What a layer needs for tokens of one kind: its way, its matrices and the frozen layer's own tensors."""

    way: Way
    matrices: Matrices
    W_OD: Tensor
    b_O: Tensor | None


class ReadyLayers:
    """Those layers of one adapter that know what they need."""

    def __init__(self) -> None:
        self.under_way: set[Hashable] = set()
        self._layers: list[ReadyLayer] | None = None

    def begin(self, forward_pass: Hashable, pairs: Callable[[], Iterable[tuple[nn.Module, Any]]]) -> None:
        """A forward pass without gradients begins, of the layers that ``pairs`` gives when they are looked for."""
        if self._layers is None:
            self._layers = []
            for frozen, layer in pairs():
                if hasattr(layer, "ready"):
                    layer.ready = ReadyLayer(self, frozen, layer)
                    self._layers.append(layer.ready)
        for layer in self._layers:
            if layer.found and layer.has_changed():
                layer.forget()
        self.under_way.add(forward_pass)

    def end(self, forward_pass: Hashable) -> None:
        """It has ended."""
        self.under_way.discard(forward_pass)

    def forget(self) -> None:
        """Look anew which layers there are."""
        self._layers = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadyLayers, ()  # the layers of a copy are others


class ReadyLayer:
    """One layer: what it has found for which kind of tokens."""

    def __init__(self, all_layers: ReadyLayers, frozen: Any, layer: AdaptedLinear) -> None:
        self.all, self.frozen, self.layer = all_layers, frozen, layer
        self.forget()

    def forget(self) -> None:
        self.found: dict[Hashable, Ready] = {}
        self._modules: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any], list[Any]]] = []
        self._hooks: list[dict[int, Any]] = []
        self._fold = self.layer.fold
        self._stamps: list[Any] = []
        self._memory: list[Tensor] = []  # as in Kept

    def get(self, frozen: Any, x_TD: Tensor) -> Ready | None:
        """For tokens like these; None where the layer has to ask."""
        if not self.all.under_way or torch.is_grad_enabled() or torch.is_autocast_enabled(x_TD.device.type):
            return None
        if self.layer.training or frozen is not self.frozen:
            return None
        kind = x_TD.dtype, x_TD.shape[0] <= FEW
        return self.found.get(kind) or self._find(kind, x_TD)

    def _find(self, kind: Hashable, x_TD: Tensor) -> Ready | None:
        W_OD = plain_weight(self.frozen, x_TD.dtype)
        parts: list[Any] = [self.layer, *getattr(self.layer.experts, "shared", ())]
        modules = [self.frozen, *(m for part in parts for m in part.modules())]
        tensors = self._tensors()
        if W_OD is None or any(is_watched(m) for m in modules):
            return None
        if any(t.is_inference() or type(t) not in (Tensor, nn.Parameter) for t in tensors):
            return None
        dtype = used_dtype(x_TD)
        way = self.layer.way(dtype)
        ready = Ready(way, self.layer.kept(way, dtype), W_OD, self.frozen.bias)
        if not self.found:
            self._stamps, self._memory = [stamp(t) for t in tensors], [t.detach() for t in tensors]
            self._modules = [(m, type(m), dict(vars(m)), m._modules, list(m._modules.values())) for m in modules]
            self._hooks = [
                hooks
                for m in modules
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            ]
        self.found[kind] = ready
        return ready

    def _tensors(self) -> list[Tensor]:
        own = self.frozen._parameters
        return [own["weight"], *([] if own.get("bias") is None else [own["bias"]]), *self.layer.sources()]

    def has_changed(self) -> bool:
        """Whether a tensor, a part, an option, a class is another one, a tensor was written to, or somebody watches."""
        if any(self._hooks) or self.layer.fold is not self._fold:
            return True
        for module, kind, state, places, parts in self._modules:
            # values are the same objects, or numbers that are equal
            if type(module) is not kind or vars(module) != state or list(places.values()) != parts:
                return True
        return not is_as_stamped(self._tensors(), self._stamps)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer has none
