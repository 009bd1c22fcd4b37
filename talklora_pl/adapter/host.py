"""How a frozen layer meets its adapters: it keeps its place and its names, and asks the active adapter first.

The class of the frozen module is exchanged for a subclass whose forward consults :class:`LayerAdapters`. So the base
model's tree, its parameter names and its own state dict stay as they were, and every trained tensor lives in one tree
of its own (``model.talklora.<adapter>``).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import currentframe
from threading import get_ident
from typing import Any

import torch
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
    """Name of the adapter that is on, or None; one object for all layers of a model.

    Attributes:
        rows: of the batches that run now, where they have adapters of their own: the numbers of the rows of each.
        running: how many forward passes of the model are under way in each thread.
        calls: depth of those of them that named adapters, and what ends their rows.
    """

    def __init__(self) -> None:
        self._active: str | None = None
        self.swapped: dict[str, SwappedParameter] = {}
        self.rows: dict[str | None, list[int]] | None = None
        self.running: Counter[int] = Counter()
        self.calls: list[tuple[int, ExitStack]] = []
        self._rows_of = 0  # the thread that they are of

    @property
    def active(self) -> str | None:
        return self._active

    @active.setter
    def active(self, name: str | None) -> None:
        if name != self._active:
            self._refuse_other_threads()
        for parameter in self.swapped.values():
            parameter.exchange(self._active, name)
        self._active = name

    def _refuse_other_threads(self) -> None:
        """Raises: UserError while another thread runs the model, which would go on with another adapter."""
        if any(count > 0 for thread, count in list(self.running.items()) if thread != get_ident()):
            raise UserError(
                "Another thread is running this model; an adapter cannot be switched under it. Let one thread switch "
                "and run, or let every row of a batch name its adapter: model(..., adapter_names=[...])."
            )

    def begin(self) -> None:
        """A forward pass begins in this thread. Raises: UserError if another thread runs rows of several adapters."""
        if self.rows is not None and self._rows_of != get_ident():
            raise UserError("Another thread is running rows of several adapters with this model; let it finish before.")
        self.running[get_ident()] += 1

    def end(self) -> None:
        """A forward pass has ended in this thread."""
        self.running[get_ident()] -= 1
        if self.running[get_ident()] <= 0:
            del self.running[get_ident()]

    @contextmanager
    def of_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside of it row i of a batch has the adapter ``names[i]``."""
        self._refuse_other_threads()
        before = self.rows, self._rows_of
        self.rows = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
        self._rows_of = get_ident()
        try:
            yield
        finally:
            self.rows, self._rows_of = before

    @contextmanager
    def one_of_rows(self, name: str | None) -> Iterator[None]:
        """Inside of it the adapter of some rows is on for all that runs: their part of a batch."""
        before = self.rows, self._active
        self.rows, self._active = None, name
        try:
            yield
        finally:
            self.rows, self._active = before

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
    index = {
        name: torch.tensor([i * each + j for i in numbers for j in range(each)], device=x.device)
        for name, numbers in switch.rows.items()
    }

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


class AdapterSet(nn.ModuleDict):
    """All adapters of one model, registered as ``model.talklora``.

    Args:
        base_path: hub name or full path of the base, empty if unknown.
    """

    def __init__(self, base_path: str) -> None:
        super().__init__()
        self.base_path = base_path
        self.switch = ActiveAdapter()
        self.hooks: tuple[Any, ...] = ()
        self.looked_for_reference = False

    def watch(self, model: nn.Module) -> None:
        """Let calls of ``model`` name the adapters of their rows, and know which threads run it."""
        before = model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        self.hooks = before, model.register_forward_hook(_after_forward, always_call=True)


def _before_forward(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    names = kwargs.get("adapter_names")
    if torch.compiler.is_compiling():
        if names is not None:
            raise UserError("adapter_names: a compiled model has one adapter for all rows.")
        return None
    adapters = adapter_set(model)
    switch = adapters.switch
    switch.begin()
    if not adapters.looked_for_reference and model.training and torch.is_grad_enabled():
        adapters.looked_for_reference = True
        _tell_of_reference()
    if "adapter_names" not in kwargs:
        return None
    if names is not None:
        inputs = next(
            (x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if inputs is not None and len(names) != len(inputs):  # a multiple of them may be beams, but not here
            raise UserError(f"adapter_names: {len(names)} names do not fit a batch with {len(inputs)} rows.")
        rows = ExitStack()
        rows.enter_context(adapter_rows(model, names))
        switch.calls.append((switch.running[get_ident()], rows))
    return args, {key: value for key, value in kwargs.items() if key != "adapter_names"}


def _tell_of_reference() -> None:
    """At the first training step: a trainer that compares with a reference model may have taken the wrong one."""
    frame = currentframe()
    while frame is not None:
        trainer, frame = frame.f_locals.get("self"), frame.f_back
        reference = getattr(trainer, "ref_model", None) if hasattr(trainer, "train_dataset") else None
        if isinstance(reference, nn.Module) and not any(isinstance(m, AdapterSet) for m in reference.modules()):
            warnings.warn(
                f"{type(trainer).__name__} compares with a second model in memory that has no adapter. That is right "
                "for an adapter that was fresh, and wrong for one that was trained before, where the reference is the "
                "model as the run started. A PeftModel has the right one and needs no second base: talklora_pl.peft "
                "in docs/export.md.",
                stacklevel=2,
            )
            return


def _after_forward(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    switch = adapter_set(model).switch
    depth = switch.running[get_ident()]
    if switch.calls and switch.calls[-1][0] == depth:
        switch.calls.pop()[1].close()
    if depth:  # else the call was refused
        switch.end()


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
        for hook in adapters.hooks:
            hook.remove()
        del model.talklora


def set_adapter(model: nn.Module, name: str) -> None:
    """Make ``name`` the adapter that is on."""
    get_adapter(model, name)
    adapter_set(model).switch.active = name


def disable_adapter(model: nn.Module) -> AbstractContextManager[None]:
    """Inside ``with disable_adapter(model):`` the model computes what the base computes."""
    return active_adapter(model, None)


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside of it ``name`` is the adapter that is on; None: none is."""
    adapters = adapter_set(model)
    before, adapters.switch.active = adapters.switch.active, name
    try:
        yield
    finally:
        # what was on may have been removed meanwhile
        adapters.switch.active = before if before is None or before in adapters else next(iter(adapters), None)


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside of it the rows of every batch have adapters of their own, as with ``model(..., adapter_names=names)``.

    For ``generate`` too, also with several beams. Each row gets what it would get alone with its adapter on.

    Args:
        names: the adapter of every row; None, or ``__base__`` as in PEFT, for the base alone.

    Raises:
        UserError: an adapter that the model has not, or that cannot be of some rows only; the model is in training
            mode, its routing is collected, or another thread runs it.
    """
    adapters = adapter_set(model)
    names, swapped = [None if name == "__base__" else name for name in names], adapters.switch.swapped
    for name in dict.fromkeys(names):
        if name is None:
            continue
        if get_adapter(model, name).config.modules_to_save or any(name in p.values for p in swapped.values()):
            raise UserError(
                f"adapter_names: {name!r} has a head or tokens of its own, which cannot be of some rows only."
            )
    if model.training:
        raise UserError("adapter_names: rows with adapters of their own are for eval mode; call model.eval() before.")
    if any(adapter.collectors for adapter in adapters.values()):
        raise UserError("adapter_names: the routing of rows of several adapters cannot be collected.")
    with adapters.switch.of_rows(names):
        yield


def base_alone(model: nn.Module) -> AbstractContextManager[None]:
    """:func:`disable_adapter`, also for a model that has none."""
    return disable_adapter(model) if isinstance(getattr(model, ADAPTERS, None), AdapterSet) else nullcontext()
