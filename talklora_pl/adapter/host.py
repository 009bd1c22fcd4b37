"""How a frozen layer meets its adapters: it keeps its place and its names, and asks the active adapter first.

The class of the frozen module is exchanged for a subclass whose forward consults :class:`LayerAdapters`. So the base
model's tree, its parameter names and its own state dict stay as they were, and every trained tensor lives in one tree
of its own (``model.talklora.<adapter>``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import currentframe
from typing import Any

from torch import Tensor, nn

from talklora_pl.errors import UserError
from talklora_pl.internals.transformers import has_accelerate_hook, renew_accelerate_hook
from talklora_pl.names import ADAPTERS


class SwappedParameter:
    """A base parameter (such as a head) that each adapter overrides; the active adapter's value is installed."""

    def __init__(self, model: Any, path: str) -> None:
        owner, _, self.leaf = path.rpartition(".")
        self.module: Any = model.get_submodule(owner)
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        self.config = model.config.get_text_config() if embedding is self.module else None
        self.base: Tensor = self.module._parameters[self.leaf].data
        self.values: dict[str, Tensor] = {}

    def exchange(self, old: str | None, new: str | None) -> None:
        """Keep the present value as that of ``old`` (it may have been trained or moved), put that of ``new``."""
        p = self.module._parameters[self.leaf]
        if old in self.values:
            self.values[old] = p.data
        else:
            self.base = p.data
        p.data = (self.values.get(new or "", self.base)).to(p.device, p.dtype)
        rows = p.shape[0]  # new tokens
        if isinstance(self.module, nn.Embedding):
            self.module.num_embeddings = rows
        elif isinstance(self.module, nn.Linear):
            self.module.out_features = rows
        if self.config is not None:
            self.config.vocab_size = rows


class ActiveAdapter:
    """Name of the adapter that is on, or None; one object for all layers of a model."""

    def __init__(self) -> None:
        self._active: str | None = None
        self.swapped: dict[str, SwappedParameter] = {}

    @property
    def active(self) -> str | None:
        return self._active

    @active.setter
    def active(self, name: str | None) -> None:
        for parameter in self.swapped.values():
            parameter.exchange(self._active, name)
        self._active = name

    @contextmanager
    def without_layers(self) -> Iterator[None]:
        """Adapted modules run as they are frozen, but what the active adapter has in place of the base's parameters
        stays."""
        before, self._active = self._active, None
        try:
            yield
        finally:
            self._active = before

    def add_value(self, model: nn.Module, path: str, name: str, value: Tensor) -> None:
        """Let ``name``, which is on, have its own value of the base's parameter ``path``."""
        parameter = self.swapped.setdefault(path, SwappedParameter(model, path))
        parameter.values[name] = value
        parameter.exchange(None, name)

    def values_of(self, name: str) -> dict[str, Tensor]:
        """What :meth:`add_value` gave to ``name``, as it is now."""
        self.active = self.active  # takes over what was trained or moved meanwhile
        return {path: p.values[name] for path, p in self.swapped.items() if name in p.values}

    def forget(self, name: str) -> None:
        """Drop the values of an adapter that is off."""
        for path, parameter in list(self.swapped.items()):
            parameter.values.pop(name, None)
            if not parameter.values:
                del self.swapped[path]


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


class AdapterSet(nn.ModuleDict):
    """All adapters of one model, registered as ``model.talklora``.

    Args:
        base_path: hub name or full path of the base, empty if unknown.
    """

    def __init__(self, base_path: str) -> None:
        super().__init__()
        self.base_path = base_path
        self.switch = ActiveAdapter()


def adapter_set(model: nn.Module) -> AdapterSet:
    """The adapters of a model.

    Raises:
        UserError: the model has none.
    """
    found = getattr(model, ADAPTERS, None)
    if not isinstance(found, AdapterSet):
        raise UserError(f"This {type(model).__name__} has no adapter; use talklora_pl.inject or load_adapter first.")
    return found


def get_adapter(model: nn.Module, name: str = "default") -> Any:
    """The adapter called ``name``.

    Raises:
        UserError: the model has no such adapter.
    """
    adapters = adapter_set(model)
    if name not in adapters:
        raise UserError(f"There is no adapter {name!r}; loaded: {', '.join(adapters) or 'none'}.")
    return adapters[name]


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


def remove_adapter(model: nn.Module, name: str = "default") -> None:
    """Take an adapter out of a model; without adapters the model is the base again."""
    adapters = adapter_set(model)
    get_adapter(model, name)
    for module in model.modules():
        detach(module, name)
    del adapters[name]
    if adapters.switch.active == name:
        adapters.switch.active = next(iter(adapters), None)
    adapters.switch.forget(name)
    if not adapters:
        del model.talklora


def set_adapter(model: nn.Module, name: str) -> None:
    """Make ``name`` the adapter that is on."""
    get_adapter(model, name)
    adapter_set(model).switch.active = name


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside ``with disable_adapter(model):`` the model computes what the base computes."""
    adapters = adapter_set(model)
    before, adapters.switch.active = adapters.switch.active, None
    try:
        yield
    finally:
        # what was on may have been removed meanwhile
        adapters.switch.active = before if before is None or before in adapters else next(iter(adapters), None)


def base_alone(model: nn.Module) -> AbstractContextManager[None]:
    """:func:`disable_adapter`, also for a model that has none."""
    return disable_adapter(model) if isinstance(getattr(model, ADAPTERS, None), AdapterSet) else nullcontext()
