"""How many bytes are alive, counted from the tensors that operators make: on any device, the meta device included."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from talklora_pl.internals.torch import TorchDispatchMode, tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside ``with LiveBytes() as live:`` memory of new tensors counts from when they are made until they are freed.

    Not seen is what an operator takes for itself while it runs, and what an allocator keeps.

    Attributes:
        now: bytes that are alive.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # it was there before, or it is known
                self._seen.add(tensor.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
