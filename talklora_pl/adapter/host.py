"""How a frozen layer meets its adapters: it keeps its place and its names, and asks the active adapter first.

The class of the frozen module is exchanged for a subclass whose forward consults a :class:`Slot`. So the base model's
tree, its parameter names and its own state dict stay as they were, and every trained tensor lives in one tree of its
own (``model.talklora.<adapter>``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from talklora_pl.errors import UserError


class Switch:
    """Name of the adapter that is on, or None; one object for all layers of a model."""

    def __init__(self) -> None:
        self.active: str | None = None


class Slot:
    """The adapters of one frozen layer by adapter name. No module: adapters are registered in their own tree."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.layers: dict[str, nn.Module] = {}


class Adapted:
    """Mixed into the class of an adapted module, in front of it."""

    frozen_class: type[nn.Module]
    talklora_slot: Slot

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self.talklora_slot
        layer = slot.layers.get(slot.switch.active) if slot.switch.active is not None else None
        if layer is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return layer(self, *args, **kwargs)

    def frozen_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, without any adapter."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]


_classes: dict[type, type] = {}


def _adapted_class(cls: type) -> type:
    if cls not in _classes:
        names = {"frozen_class": cls, "__module__": cls.__module__}
        _classes[cls] = type(f"Adapted{cls.__name__}", (Adapted, cls), names)
    return _classes[cls]


class AdapterSet(nn.ModuleDict):
    """All adapters of one model, registered as ``model.talklora``."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = Switch()


def adapter_set(model: nn.Module) -> AdapterSet:
    """The adapters of a model.

    Raises:
        UserError: the model has none.
    """
    found = getattr(model, "talklora", None)
    if not isinstance(found, AdapterSet):
        raise UserError(f"This {type(model).__name__} has no adapter; use talklora_pl.inject or load_adapter first.")
    return found


def attach(module: Any, switch: Switch, name: str, layer: nn.Module) -> None:
    """Give one frozen module the adapter layer ``layer`` under the adapter's name."""
    if not isinstance(module, Adapted):
        module.__class__ = _adapted_class(type(module))
        module.talklora_slot = Slot(switch)
    module.talklora_slot.layers[name] = layer


def detach(module: nn.Module, name: str) -> None:
    """Take one adapter from a module; with the last of them the module is what it was before."""
    if isinstance(module, Adapted):
        module.talklora_slot.layers.pop(name, None)
        if not module.talklora_slot.layers:
            del module.talklora_slot
            module.__class__ = module.frozen_class  # type: ignore[assignment]


def remove_adapter(model: nn.Module, name: str = "default") -> None:
    """Take an adapter out of a model; without adapters the model is the base again."""
    adapters = adapter_set(model)
    if name not in adapters:
        raise UserError(f"There is no adapter {name!r}; loaded: {', '.join(adapters) or 'none'}.")
    for module in model.modules():
        detach(module, name)
    del adapters[name]
    if adapters.switch.active == name:
        adapters.switch.active = next(iter(adapters), None)
    if not adapters:
        del model.talklora


def set_adapter(model: nn.Module, name: str) -> None:
    """Make ``name`` the adapter that is on."""
    adapters = adapter_set(model)
    if name not in adapters:
        raise UserError(f"There is no adapter {name!r}; loaded: {', '.join(adapters) or 'none'}.")
    adapters.switch.active = name


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside ``with disable_adapter(model):`` the model computes what the base computes."""
    switch = adapter_set(model).switch
    before, switch.active = switch.active, None
    try:
        yield
    finally:
        switch.active = before
