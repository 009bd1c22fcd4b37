"""What a CUDA graph does, on a CPU: operators are written down, and run again on the same memory.

Nothing of the Python that called them runs again. So a number that stood in the code stays what it was, and a tensor
that was made outside is read where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.operators import WAITS


class Tape(TorchDispatchMode):
    """Raises: RuntimeError: an operator whose result the host has to know, as with a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        # as they are now: what lies where it lay may be given another shape
        given = tree_map(_as_now, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if not func.is_view and torch.Tag.inplace_view not in func.tags:
            self.calls.append((func, *given, [_as_now(t) for t in tree_leaves(out) if isinstance(t, Tensor)]))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            now = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(before, now, strict=True):
                if old.data_ptr() != new.data_ptr():  # else written in place
                    old.copy_(new)


def _as_now(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def record(run: Callable[[], Any]) -> Callable[[], None]:
    """As :func:`talklora_pl.captured.cuda_graphs`."""
    with Tape() as tape:
        run()
    return tape.replay
