"""Parameter products of equal layers, made for all of them at once when a forward pass of the model begins.

What a layer multiplies its tokens with (:class:`~talklora_pl.sites.matrices.Matrices`) depends on its parameters alone.
A model has hundreds of adapted Linears and a handful of kinds of them: the parameters of equal layers are stacked, and
the formula of the layer itself runs once for the stack (``torch.vmap``). So the host launches some operators for a kind
and step that were some for every layer and step.

What is made so serves one forward pass, and gradient checkpointing where it computes layers of that again. Without
gradients layers keep what they have folded anyway, and compiled layers fuse their own formula: these take no part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from talklora_pl.errors import in_a_line
from talklora_pl.kept import Kept
from talklora_pl.sites.linear import AdaptedLinear
from talklora_pl.sites.matrices import Made, Matrices, Pass, Way

Pairs = Iterable[tuple[nn.Module, nn.Module]]
"""Frozen modules with their adapter layers."""


class Together:
    """The layers of one adapter, by kind.

    Attributes:
        on: off, every layer makes its own.
    """

    def __init__(self) -> None:
        self.on = True
        self._pass = Pass()
        self.forget()

    def forget(self) -> None:
        """Look anew which layers are equal."""
        self._groups: list[_Group] | None = None

    def make(self, model: nn.Module, pairs: Callable[[], Pairs]) -> None:
        """A forward pass of ``model`` with gradients begins; ``pairs`` looks for its layers."""
        if self._groups is None:
            # of the embeddings, with which tokens begin
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
            self._groups = list(_groups(pairs(), dtype))
        self._pass = Pass()
        for group in self._groups:
            group.made = self.on and group.make(self._pass)
            if not group.made:
                for layer in group.layers:
                    layer.made = None

    def close(self) -> None:
        """The forward pass has ended."""
        self._pass.under_way = False
        for group in self._groups or ():
            group.look_back()

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, ()  # the layers of a copy are others


class _Group:
    """Layers whose formula is the same but for the values of their tensors."""

    def __init__(self, layers: list[AdaptedLinear], dtype: torch.dtype) -> None:
        self.layers = layers
        self.dtype = dtype  # of the base
        self.on = True
        self.made = False  # in the forward pass that is under way
        self._formula = _Formula(layers[0])
        self._places = [_tensors(layer) for layer in layers]

    def make(self, during: Pass) -> bool:
        """Whether it has made what its layers need."""
        if not (self.on and self.layers[0].fold):
            return False
        kind = self.layers[0].experts.down().device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        way = self.layers[0].way(dtype)
        used = [False] * len(self.layers)
        try:
            matrices, stacks = self._stacked(way, dtype, used)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # a part that somebody wrote may do what cannot be done for several at once
            self.on = False
            warnings.warn(
                f"{self.layers[0].name} and {len(self.layers) - 1} layers like it: their parameters are multiplied "
                "layer by layer, which takes longer, because a part cannot do it for several at once "
                f"({in_a_line(e)}).",
                stacklevel=2,
            )
            return False
        rows = zip(*(_Unstack.apply(used, stack) for stack in stacks.values()), strict=True)
        for layer, row in zip(self.layers, rows, strict=True):
            own = matrices._replace(**dict(zip(stacks, row, strict=True)))
            layer.made = Made(during, way, own, layer.sources())
        return True

    def look_back(self) -> None:
        """Layers that needed something else, as with an autocast that begins inside of the model, make their own."""
        if self.made and all(layer.made is None for layer in self.layers):
            self.on = False
        self.made = False

    def _stacked(self, way: Way, dtype: torch.dtype, used: list[bool]) -> tuple[Matrices, dict[str, Tensor]]:
        """The first layer's matrices, for all in them that is no tensor, and the tensors of all layers."""
        one: list[Matrices] = []

        def formula(of_one: dict[str, Tensor]) -> dict[str, Tensor]:
            one.append(functional_call(self._formula, of_one, (way, dtype)))
            return {name: t for name, t in zip(Matrices._fields, one[0], strict=True) if isinstance(t, Tensor)}

        stacks = {}
        for name in self._places[0]:
            place_and_key = (places[name] for places in self._places)
            stacks[name] = _Stack.apply(used, *(place[key] for place, key in place_and_key))
        made: dict[str, Tensor] = torch.vmap(formula)(stacks)
        return one[0], made


class _Stack(torch.autograd.Function):
    """Tensors of all layers as one. A layer that had no part in the loss gets no gradient, as without a stack."""

    @staticmethod
    def forward(ctx: Any, used: list[bool], *tensors: Tensor) -> Tensor:
        ctx.used = used
        return torch.stack(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        # a gradient that lies transposed would be copied for every layer
        return None, *(row if used else None for row, used in zip(d.contiguous().unbind(), ctx.used, strict=True))


class _Unstack(torch.autograd.Function):
    """A stack as tensors for every layer; which of them a loss has used is left in ``used``, for :class:`_Stack`."""

    @staticmethod
    def forward(ctx: Any, used: list[bool], stack: Tensor) -> tuple[Tensor, ...]:
        ctx.used = used
        ctx.set_materialize_grads(False)
        return stack.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *rows: Tensor | None) -> tuple[None, Tensor | None]:
        some = next((row for row in rows if row is not None), None)
        if some is None:
            return None, None
        for i, row in enumerate(rows):
            ctx.used[i] |= row is not None
        return None, torch.stack([torch.zeros_like(some) if row is None else row for row in rows])


class _Formula(nn.Module):
    """A layer's matrices as a forward pass, whose parameters ``functional_call`` exchanges."""

    def __init__(self, layer: AdaptedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, way: Way, dtype: torch.dtype) -> Matrices:
        return self.layer.matrices(way, dtype, fused=False).ready(dtype, fused=False)


def _groups(pairs: Pairs, hidden: torch.dtype) -> Iterable[_Group]:
    """Of more than one layer each; ``hidden``: of tokens, where the weight, being quantised, does not say it."""
    kinds: dict[tuple[torch.dtype, Hashable], list[AdaptedLinear]] = {}
    for frozen, layer in pairs:
        if isinstance(layer, AdaptedLinear):
            layer.made = None
            weight: Any = getattr(frozen, "weight", None)
            plain = isinstance(weight, Tensor) and weight.is_floating_point()
            kinds.setdefault((weight.dtype if plain else hidden, tuple(_kind(layer))), []).append(layer)
    return (_Group(layers, dtype) for (dtype, _), layers in kinds.items() if len(layers) > 1)


def _tensors(layer: AdaptedLinear) -> dict[str, tuple[dict[str, Any], str]]:
    """Where the tensors of a layer are, by the name that they have in :class:`_Formula`."""
    return {
        f"layer.{path}{'.' if path else ''}{name}": (place, name)
        for path, m in layer.named_modules()
        for place in (m._parameters, m._buffers)
        for name, tensor in place.items()
        if tensor is not None
    }


_OF_EVERY_MODULE = vars(nn.Module()).keys()
_VALUES = (bool, int, float, str, torch.dtype, torch.device, type(None))


def _kind(layer: AdaptedLinear) -> Iterable[Hashable]:
    """Equal for layers whose formula is the same: their code, numbers and shapes.

    An object that is neither a number nor a module is equal to itself alone.
    """
    yield from (layer.scale, layer.experts_see_talk, layer.decides)
    for path, m in layer.named_modules():
        yield path, type(m)
        for name, value in () if m is layer else vars(m).items():
            if name not in _OF_EVERY_MODULE and not isinstance(value, Kept):
                values = value if isinstance(value, tuple) else (value,)
                yield name, *(v if isinstance(v, _VALUES) else id(v) for v in values)
    for path, (place, name) in _tensors(layer).items():
        tensor = place[name]
        yield path, type(tensor), tensor.shape, tensor.dtype, tensor.device
