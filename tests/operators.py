"""The operators that a piece of code gives to PyTorch: how many, which on a GPU is about the kernels it launches, and
those that the host has to wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class Operators(TorchDispatchMode):
    """Names of the operators inside of the context, in order.

    Left out: allocations (``empty`` and the like; ``zeros`` and ``full`` are not, they write) and views, which are the
    operators whose schema returns an alias of an argument (``view``, ``t``, ``expand``, ``slice``, ``split``,
    ``detach``, ...) and ``_unsafe_view``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if not func.is_view and packet is not aten._unsafe_view and packet not in ALLOCATIONS:
            self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "bincount",
    "is_nonzero",
    "equal",
}
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Names of the operators inside of the context whose result the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        unknown = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or name.startswith(("unique", "_unique")) or by_mask or unknown:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def forward_and_backward(module: nn.Module, x: Tensor, dy: Tensor) -> list[str]:
    """Operators of a second run; the first one may fill what is kept."""
    for _ in range(2):
        x.grad = None
        module.zero_grad(set_to_none=True)
        with Operators() as operators:
            module(x).backward(dy)
    return operators.names
