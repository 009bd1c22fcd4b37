"""How a frozen layer meets its adapters: it keeps its place and its names, and asks the active adapter first.

The class of the frozen module is exchanged for a subclass whose forward consults :class:`LayerAdapters`. So the base
model's tree, its parameter names and its own state dict stay as they were, and every trained tensor lives in one tree
of its own (``model.talklora.<adapter>``, see :mod:`talklora_pl.adapter.adapters`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from inspect import currentframe
from typing import Any

from torch import Tensor, nn

from talklora_pl.adapter.active import ActiveAdapter
from talklora_pl.errors import UserError
from talklora_pl.internals.transformers import has_accelerate_hook, renew_accelerate_hook


class LayerAdapters:
    """The adapters of one frozen layer by adapter name. No module: adapters are registered in their own tree."""

    def __init__(self, switch: ActiveAdapter) -> None:
        self.switch = switch
        self.layers: dict[str, nn.Module] = {}


class Adapted:
    """Mixed into the class of an adapted module, whose own forward it replaces."""

    frozen_class: type[nn.Module]
    talklora_adapters: LayerAdapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.talklora_adapters
        if adapters.switch.rows is not None:
            return _forward_by_rows(self, adapters, *args, **kwargs)
        layer = adapters.layers.get(adapters.switch.active) if adapters.switch.active is not None else None
        if layer is None:
            return self.frozen_forward(*args, **kwargs)
        return layer(self, *args, **kwargs)

    def frozen_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, without any adapter."""
        return self.frozen_class.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and ``copy``: the class has no name to import it by, so that of the frozen one is given."""
        reduced: Any = self.frozen_class.__reduce_ex__(self, protocol)
        _, _, *state = reduced
        return _empty, (self.frozen_class,), *state

    @property
    def base_layer(self) -> Any:
        """There is none; but PEFT, whose layers ask this of the one that they are about to wrap, learns why it may not.

        Raises:
            UserError: for PEFT, which has not changed the model yet.
        """
        caller = currentframe()
        if caller is not None and caller.f_back is not None and caller.f_back.f_code.co_name == "get_base_layer":
            raise UserError(
                f"This {self.frozen_class.__name__} has an adapter of talklora_pl, and PEFT cannot put its own around "
                "it. Take ours out (remove_adapter) or merge it (merge_adapter) first, or give PEFT other modules."
            )
        raise AttributeError("base_layer")


def _forward_by_rows(module: Adapted, adapters: LayerAdapters, *args: Any, **kwargs: Any) -> Any:
    """The rows of every adapter by themselves, put together again. Blocks that only decide, and whose Linears add what
    there is to add, decide for the rows of each and run once."""
    switch = adapters.switch
    assert switch.rows is not None
    layers: dict[str | None, Any] = {name: adapters.layers.get(name or "") for name in switch.rows}
    if not any(layers.values()):
        return module.frozen_forward(*args, **kwargs)
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    rows = sum(map(len, switch.rows.values()))
    each, rest = divmod(x.shape[0], rows)  # consecutive: beams of a row, or tokens of a flat batch
    if rest:
        raise UserError(f"adapter_names: {rows} names do not fit a batch with {x.shape[0]} rows.")
    index = switch.places(each, x.device)

    def part(value: Any, name: str | None) -> Any:
        ours = isinstance(value, Tensor) and value.shape[:1] == x.shape[:1]
        return value.index_select(0, index[name]) if ours else value

    if all(hasattr(layer, "decided") for layer in layers.values() if layer is not None):
        with ExitStack() as stack:
            for name, layer in layers.items():
                if layer is not None:
                    stack.enter_context(layer.decided(part(x, name)))
            return module.frozen_forward(*args, **kwargs)
    out: Tensor | None = None
    for name, layer in layers.items():
        run: Callable[..., Tensor] = module.frozen_forward if layer is None else lambda *a, **k: layer(module, *a, **k)  # noqa: B023
        with switch.one_of_rows(name):
            y = run(*(part(a, name) for a in args), **{k: part(v, name) for k, v in kwargs.items()})
        out = y.new_empty(x.shape[0], *y.shape[1:]) if out is None else out
        out.index_copy_(0, index[name], y)
    return out


_classes: dict[type, type] = {}


def _adapted_class(cls: type) -> type:
    """Raises: TypeError if nothing can be derived from ``cls``."""
    if cls not in _classes:
        names = {"frozen_class": cls, "__module__": cls.__module__}
        names |= {name: vars(Adapted)[name] for name in ("forward", "__reduce_ex__")}
        # the class's own bases come first: with another in front, objects of the two can differ in layout
        _classes[cls] = type(f"Adapted{cls.__name__}", (cls, Adapted), names)
    return _classes[cls]


def _empty(frozen_class: type) -> Any:
    """An adapted module before unpickling or copying gives it its state."""
    cls: Any = _adapted_class(frozen_class)
    return cls.__new__(cls)


def check_attachable(name: str, module: nn.Module) -> None:
    """Refuse a module whose class cannot be exchanged, or whose forward is not that of its class.

    Raises:
        UserError: names the module.
    """
    cls = type(module)
    if not isinstance(module, Adapted):
        try:
            module.__class__ = _adapted_class(cls)
            module.__class__ = cls
        except TypeError as e:
            raise UserError(
                f"{name!r} is a {cls.__module__}.{cls.__qualname__}, a class that no adapter can be put on ({e}). "
                f"Leave it out: exclude: [{name}]."
            ) from e
    if "forward" in module.__dict__ and not isinstance(module, Adapted) and not has_accelerate_hook(module):
        raise UserError(
            f"The forward of {name!r} was replaced by other code, past which no adapter comes; load the adapter before."
        )


def check_no_peft(model: nn.Module) -> None:
    """Refuse a model that PEFT has put layers of its own into.

    Raises:
        UserError: says how to get the base back.
    """
    for name, module in model.named_modules():
        if any(c.__module__.partition(".")[0] == "peft" for c in type(module).__mro__):
            where = repr(name) if name else f"it is a {type(module).__name__}"
            raise UserError(
                f"This model carries an adapter of PEFT ({where}), and talklora_pl's works on the plain base only. Get "
                "that from the PeftModel, with its adapter in the weights (merge_and_unload()) or without it "
                "(unload()); where there is none, as after add_adapter of transformers, load the base anew."
            )


def attach(module: Any, switch: ActiveAdapter, name: str, layer: nn.Module) -> None:
    """Give one frozen module the adapter layer ``layer`` under the adapter's name."""
    if not isinstance(module, Adapted):
        module.__class__ = _adapted_class(type(module))
        module.talklora_adapters = LayerAdapters(switch)
        renew_accelerate_hook(module)
    module.talklora_adapters.layers[name] = layer


def detach(module: nn.Module, name: str) -> None:
    """Take one adapter from a module; with the last of them the module is what it was before."""
    if isinstance(module, Adapted):
        module.talklora_adapters.layers.pop(name, None)
        if not module.talklora_adapters.layers:
            del module.talklora_adapters
            module.__class__ = module.frozen_class  # type: ignore[assignment]
            renew_accelerate_hook(module)
