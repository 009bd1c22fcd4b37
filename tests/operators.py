"""Counts the operators that a piece of code gives to PyTorch, which on a GPU are about the kernels it launches."""

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


def forward_and_backward(module: nn.Module, x: Tensor, dy: Tensor) -> list[str]:
    """Operators of a second run; the first one may fill what is kept."""
    for _ in range(2):
        x.grad = None
        module.zero_grad(set_to_none=True)
        with Operators() as operators:
            module(x).backward(dy)
    return operators.names
