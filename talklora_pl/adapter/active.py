"""Which adapter of a model is on, for all rows or for each; and what it has in place of the base's parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.errors import UserError


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
        self._places: dict[tuple[int, torch.device, bool], dict[str | None, Tensor]] = {}

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
        self._rows_of, self._places = get_ident(), {}
        try:
            yield
        finally:
            self.rows, self._rows_of = before
            self._places = {}

    def places(self, each: int, device: torch.device) -> dict[str | None, Tensor]:
        """Where the parts of every adapter are, in a batch with ``each`` for every row: made once for all layers and
        passes, because the host waits for a device that it brings something to."""
        assert self.rows is not None
        key = each, device, torch.is_inference_mode_enabled()  # a tensor made there is of no use elsewhere
        if key not in self._places:
            self._places[key] = {
                name: torch.tensor([i * each + j for i in numbers for j in range(each)], device=device)
                for name, numbers in self.rows.items()
            }
        return self._places[key]

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
