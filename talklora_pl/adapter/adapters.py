"""The adapters of one model: which it has, which is on, and the rows of a batch that have their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from inspect import currentframe
from threading import get_ident
from typing import Any

import torch
from torch import nn

from talklora_pl.adapter.active import ActiveAdapter
from talklora_pl.adapter.host import Adapted, detach
from talklora_pl.errors import UserError
from talklora_pl.names import ADAPTERS


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
    switch, active = adapters.switch, adapters.switch.active
    switch.begin()
    if not adapters.looked_for_reference and model.training and torch.is_grad_enabled():
        adapters.looked_for_reference = True
        _tell_of_reference()
    if active is not None:
        adapter: Any = adapters[active]
        pairs = partial(adapted_by, model, active)
        if torch.is_grad_enabled():
            adapter.together.make(model, pairs)
        elif not model.training:
            adapter.ready.begin(_this_pass(switch), pairs)
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


def _this_pass(switch: ActiveAdapter) -> tuple[int, int]:
    return get_ident(), switch.running[get_ident()]


def adapted_by(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Frozen modules of a model, with their layers of the adapter ``name``."""
    for module in model.modules():
        if isinstance(module, Adapted) and name in module.talklora_adapters.layers:
            yield module, module.talklora_adapters.layers[name]


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
    adapters = adapter_set(model)
    switch = adapters.switch
    depth = switch.running[get_ident()]
    if switch.calls and switch.calls[-1][0] == depth:
        switch.calls.pop()[1].close()
    each: Any = adapters.values()
    for adapter in each:
        adapter.together.close()
        adapter.ready.end(_this_pass(switch))
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
