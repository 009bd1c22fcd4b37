"""Token by token without gradients: what a layer would find out for every token is found out once.

For one token the arithmetic of a small Linear takes less time than the questions before it: which way, with which
matrices, in which dtype, is anybody watching. The answers hold until something changes. A forward pass of the model
begins by looking whether anything has, for all layers in a row; within it they take what they know. Layers that are
called by themselves, with gradients, under autocast or in training mode ask every time.

T tokens, D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talklora_pl.internals.torch import STAMP, is_as_stamped, stamp
from talklora_pl.sites.folding import is_watched
from talklora_pl.sites.fused import FEW, plain_weight, used_dtype
from talklora_pl.sites.matrices import Matrices, Way
from talklora_pl.sites.mixture import Mixture


class Ready(NamedTuple):
    """What a layer needs for tokens of one kind: its way, its matrices and the frozen layer's own tensors.

    Attributes:
        parts: experts, scores and router, where these are all that decides, in the folded way and in float32 or more.
    """

    way: Way
    matrices: Matrices
    W_OD: Tensor
    b_O: Tensor | None
    parts: tuple[Any, ...] = ()

    def folded(self, x_TD: Tensor) -> Tensor:
        """As ``AdaptedLinear.forward`` with such parts while nobody collects: its operators, with less between them."""
        experts, scores, router = self.parts
        m = self.matrices
        y_TO, product_TM = self.frozen_and_down(x_TD)
        h_TP, logits_TE = product_TM.split((product_TM.shape[1] - m.scores, m.scores), 1)
        w_TE = router.route(scores.heated(logits_TE if m.bias_E is None else logits_TE + m.bias_E)).weights_TE
        return self.add_up(y_TO, (experts.split(h_TP) * w_TE.unsqueeze(-1)).flatten(1))

    def frozen_and_down(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """As the function of this name, for tokens of this kind."""
        down_MD = self.matrices.down_MD
        return F.linear(x_TD, self.W_OD, self.b_O), F.linear(x_TD.to(down_MD.dtype), down_MD)

    def add_up(self, y_TO: Tensor, z_TQ: Tensor) -> Tensor:
        """As the function of this name, for tokens of this kind."""
        up_QO = self.matrices.up_QO
        z_TQ = z_TQ.to(up_QO.dtype)
        return y_TO.addmm_(z_TQ, up_QO) if up_QO.dtype == y_TO.dtype else y_TO.add_(z_TQ @ up_QO)


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
    """One layer: what it has found for which kind of tokens.

    Args:
        frozen: the layer that is adapted.
        layer: its :class:`~talklora_pl.sites.linear.AdaptedLinear`.
    """

    def __init__(self, all_layers: ReadyLayers, frozen: Any, layer: Any) -> None:
        self.all, self.frozen, self.layer = all_layers, frozen, layer
        self.forget()

    def forget(self) -> None:
        """Ask anew the next time."""
        self.found: dict[tuple[torch.dtype, bool], Ready] = {}
        self._modules: list[tuple[nn.Module, type, dict[str, Any], list[Any]]] = []
        self._hooks: list[dict[int, Any]] = []
        self._fold = self.layer.fold
        self._stamps: list[STAMP] = []
        self._memory: list[Tensor] = []  # as in Kept

    def get(self, frozen: Any, x_TD: Tensor) -> Ready | None:
        """For tokens like these; None where the layer has to ask."""
        if not self.all.under_way or torch.is_grad_enabled() or torch.is_autocast_enabled(x_TD.device.type):
            return None
        if self.layer.training or frozen is not self.frozen:
            return None
        kind = x_TD.dtype, x_TD.shape[0] <= FEW
        return self.found.get(kind) or self._find(kind, x_TD)

    def _find(self, kind: tuple[torch.dtype, bool], x_TD: Tensor) -> Ready | None:
        W_OD = plain_weight(self.frozen, x_TD.dtype)
        if W_OD is None or W_OD is not self.frozen.weight:  # a view would outlive what it is of
            return None
        sources = self.layer.sources()
        if any(t.is_inference() or type(t) not in (Tensor, nn.Parameter) for t in sources):
            return None
        parts: list[Any] = [self.layer, *getattr(self.layer.experts, "shared", ())]
        modules = [self.frozen, *(m for part in parts for m in part.modules())]
        if any(is_watched(m) for m in modules):
            return None
        dtype = used_dtype(x_TD)
        way = self.layer.way(dtype)
        ready = Ready(way, self.layer.kept(way, dtype), W_OD, self.frozen.bias, self._parts(way, dtype))
        if not self.found:
            self._stamps, self._memory = [stamp(t) for t in sources], [t.detach() for t in sources]
            self._modules = [(m, type(m), dict(vars(m)), list(m._modules.values())) for m in modules]
            self._hooks = [
                hooks
                for m in modules
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            ]
        self.found[kind] = ready
        return ready

    def _parts(self, way: Way, dtype: torch.dtype) -> tuple[Any, ...]:
        layer = self.layer
        # no block decides for it, and a routing is only handed on
        decides = way == "folded" and layer.decided_by == layer.name and type(layer).observed is Mixture.observed
        if not decides or dtype.itemsize < 4:  # whose logits would have to be cast
            return ()
        return layer.experts, layer.router.scores, layer.router

    def has_changed(self) -> bool:
        """Whether a tensor, part, option or class is another one, a trained tensor was written to, or somebody watches.

        The frozen tensors are multiplied with as they are; what they hold does not matter.
        """
        if any(self._hooks) or self.layer.fold is not self._fold:
            return True
        for module, kind, state, parts in self._modules:
            if type(module) is not kind or _differ(vars(module), state) or list(module._modules.values()) != parts:
                return True
        own = self.frozen._parameters
        for (dtype, _), ready in self.found.items():
            if own["weight"] is not ready.W_OD or own["bias"] is not ready.b_O or ready.W_OD.dtype != dtype:
                return True
        return not is_as_stamped(self.layer.sources(), self._stamps)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer has none


def _differ(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Whether not all are the same objects or equal numbers."""
    try:
        return now != then
    except (RuntimeError, ValueError):  # other tensors or arrays, which are compared number by number
        return True
