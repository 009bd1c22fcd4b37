"""What a training step takes on one device, before any weight is loaded.

The model is built from its configuration, and a training step on a batch of the run's data is run by operators that
only work out shapes, with two decoder layers of each kind and again with a third; the rest is a multiplication. So
whatever a base, an adapter, an objective or a way of checkpointing keeps is in the numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from talklora_pl.internals.torch import ShapesOnly
from talklora_pl.internals.transformers import whole_classes
from talklora_pl.memory.checkpointing import Checkpointing, checkpoint_layers
from talklora_pl.memory.live import LiveBytes


class Placement(NamedTuple):
    """How a run is spread: ``one`` device, ``ddp`` or ``fsdp`` over several; `offload`: shards are in main memory."""

    kind: str = "one"
    devices: int = 1
    offload: bool = False

    def __str__(self) -> str:
        return "one device" if self.kind == "one" else f"{self.kind} over {self.devices}"


@dataclass(frozen=True)
class Step:
    """Bytes of the forward and backward pass of a micro-batch.

    Attributes:
        kept: activations that wait for the backward pass, at the end of the forward pass.
        peak: the most there is at once; with it logits, loss, and the gradients that are already there.
    """

    kept: int
    peak: int


@dataclass(frozen=True)
class Need:
    """Bytes on one device at the worst moment of a step.

    Attributes:
        weights: the frozen base, or its share and the layers that are gathered.
        adapters: what is trained.
        optimiser: its states.
        gradients: of what is trained, as far as they are there beside the activations, and copies that travel.
        activations: see :class:`Step`.
        logits: logits, loss, and what comes and goes.
    """

    weights: int
    adapters: int
    optimiser: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class Estimator:
    """Sizes of a model on the meta device with its adapter, and of its training step.

    Args:
        model: with its adapter, on the meta device; it is used up.
        loss: of the model and a batch, as the training step computes it.
        batch: of real tensors in main memory.
        state_ratio: bytes of the optimiser's states per byte that is trained.
        accumulates: whether gradients of earlier micro-batches are there during a step.
        recorded: whether steps are recorded; graphs keep the memory of one, beside that of a step that is not replayed.
        stored: bytes of frozen parameters that are kept in few bits, by their id. (Activations are those of the base
            in full.)
    """

    def __init__(
        self,
        model: Any,
        loss: Callable[[Any, Mapping[str, Any]], Tensor],
        batch: Mapping[str, Any],
        state_ratio: float,
        accumulates: bool = False,
        recorded: bool = False,
        stored: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.model, self.loss, self.batch = model.train(), loss, batch
        self.accumulates, self.recorded = accumulates, recorded
        self.blocks = _blocks(model)
        layers = [layer for blocks in self.blocks for layer in blocks]
        self.frozen = _frozen_bytes(model, stored)
        self.trained = _bytes(p for p in model.parameters() if p.requires_grad)
        self.optimiser = math.ceil(state_ratio * self.trained)
        sizes = [_frozen_bytes(layer, stored) for layer in layers]
        self.largest, self.rest = max(sizes, default=0), self.frozen - sum(sizes)
        self.buffers = _bytes(model.buffers())
        self._steps: dict[Checkpointing, Step] = {}
        self._kinds = [Counter(map(_kind, blocks)) for blocks in self.blocks]
        self._samples = [_samples(blocks) for blocks in self.blocks]
        self._shapes: ShapesOnly | None = None

    def need(self, mode: Checkpointing, placement: Placement) -> Need:
        """What a step takes."""
        step = self.step(mode)
        if self.recorded and mode == "off":
            step = Step(2 * step.kept, 2 * step.peak)
        weights = self.frozen + self.buffers
        copies = 0 if placement.kind == "one" else self.trained  # gradients that are sent
        if placement.kind == "fsdp":
            # the rest stays gathered from the forward to the backward pass, beside a layer and the next one
            shards = 0 if placement.offload else math.ceil(self.frozen / placement.devices)
            weights = shards + self.rest + 2 * self.largest + self.buffers
        held = self.trained if self.accumulates else 0
        gradients = held + (copies if placement.kind == "ddp" else 0)
        worst = max(step.peak, self.trained + copies - gradients)  # of the passes, or when gradients are averaged
        return Need(weights, self.trained, self.optimiser, gradients, min(step.kept, worst), max(0, worst - step.kept))

    def step(self, mode: Checkpointing) -> Step:
        """Bytes of the forward and backward pass, of all layers.

        Raises:
            RuntimeError: something in the model depends on the values in its tensors.
        """
        if mode not in self._steps:
            with self._shapes_only():
                self._steps[mode] = self._whole(mode)
        return self._steps[mode]

    def _whole(self, mode: Checkpointing) -> Step:
        checkpoint_layers(self.model, mode)
        try:
            few = [{id(layer) for some in samples.values() for layer in some[:2]} for samples in self._samples]
            first = self._run(few)
            kept, peak = first.kept, first.peak
            for i, kinds in enumerate(self._kinds):
                for kind, number in kinds.items():
                    if number > 2:
                        third = {id(self._samples[i][kind][2])}
                        more = self._run([some | third if at == i else some for at, some in enumerate(few)])
                        kept += (number - 2) * (more.kept - first.kept)
                        peak += (number - 2) * (more.peak - first.peak)
        finally:
            if mode != "off":
                self.model.activation_checkpointing_disable()
        return Step(kept, peak)

    def _run(self, run: list[set[int]]) -> Step:
        """With these decoder layers alone, in their order."""
        whole = [dict(blocks._modules) for blocks in self.blocks]
        try:
            for blocks, some in zip(self.blocks, run):
                layers = [layer for layer in blocks if id(layer) in some]
                blocks._modules = {str(i): layer for i, layer in enumerate(layers)}
            self.model.train()  # which looks anew what layers there are
            with LiveBytes() as live:
                loss = self.loss(self.model, self.batch)
                kept = live.now
                loss.backward()
                del loss
            # logits are no activation: they are gone before the first layer's backward pass
            return Step(kept, live.peak)
        finally:
            for blocks, modules in zip(self.blocks, whole):
                blocks._modules = modules
            for p in self.model.parameters():
                p.grad = None

    @contextmanager
    def _shapes_only(self) -> Iterator[None]:
        """Operators make tensors without memory; the model's become such tensors."""
        first, self._shapes = self._shapes is None, self._shapes or ShapesOnly()
        with torch.random.fork_rng(devices=[]), self._shapes as shapes:
            if first:
                used = {id(layer) for samples in self._samples for pair in samples.values() for layer in pair}
                for blocks in self.blocks:  # what is not run need not be converted
                    blocks._modules = {n: m for n, m in blocks._modules.items() if id(m) in used}
                _convert(self.model, shapes)
                self.batch = {k: shapes.of(v) if isinstance(v, Tensor) else v for k, v in self.batch.items()}
            yield


def state_ratio(optimizer: Callable[[Any], Any]) -> float:
    """Bytes of an optimiser's states per byte that is trained, from one step on a small matrix."""
    p = nn.Parameter(torch.zeros(64, 64))
    p.grad = torch.zeros_like(p)
    made = optimizer([{"params": [p]}])
    made.step()
    return _bytes(t for t in made.state[p].values() if isinstance(t, Tensor)) / _bytes([p])


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _frozen_bytes(module: nn.Module, stored: Mapping[int, int]) -> int:
    frozen = [p for p in module.parameters() if not p.requires_grad]
    return sum(stored[id(p)] if id(p) in stored else _bytes([p]) for p in frozen)


def _blocks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of decoder layers."""
    names = whole_classes(model)
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and all({c.__name__ for c in type(b).__mro__} & names for b in m)
    ]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Layers of one kind take alike much: their frozen tensors are of one shape, and the same ones are adapted."""
    return (type(layer), *((n, type(m), tuple(p.shape for p in m.parameters(False))) for n, m in layer.named_modules()))


def _samples(blocks: nn.ModuleList) -> dict[tuple[Any, ...], list[nn.Module]]:
    """Up to three layers of each kind."""
    out: dict[tuple[Any, ...], list[nn.Module]] = {}
    for layer in blocks:
        found = out.setdefault(_kind(layer), [])
        if len(found) < 3:
            found.append(layer)
    return out


def _convert(model: nn.Module, shapes: ShapesOnly) -> None:
    done: dict[int, tuple[Tensor, Tensor]] = {}  # tied tensors stay one
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    new = done.get(id(tensor), (shapes.of(tensor), tensor))
                    done[id(tensor)], tensors[name] = new, new[0]  # type: ignore[assignment]
