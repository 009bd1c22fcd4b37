"""How many bytes are alive, counted from the tensors that operators make: on any device, the meta device included."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from talklora_pl.internals.torch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Inside ``with LiveBytes() as live:`` memory of new tensors counts from when they are made until they are freed.

    What an operator takes for itself while it runs is not seen, nor is what an allocator keeps.

    Args:
        there: tensors that were there before; operators may hand out views of them.

    Attributes:
        now: bytes that are alive.
        peak: the most there were.
    """

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
