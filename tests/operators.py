"""The operators that a piece of code gives to PyTorch: how many, which on a GPU is about the kernels it launches, and
those that the host has to wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
            self.saw(name, args)
        return func(*args, **(kwargs or {}))

    def saw(self, name: str, args: Any) -> None:
        self.names.append(name)


class Reads(Waits):
    """As if there were a device: what makes the host wait for its numbers, transfers among it.

    On the host is what ``cpu()`` and its like give, what is made of no tensor and for no device, and what is computed
    from such tensors alone; all else, as the model and its batches, is on the device. :meth:`waits` stands for the
    package's own question, which is about a tensor's device.

    Attributes:
        names: as in :class:`Waits`, for tensors on the host too.
        reads: those on the device, and transfers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._host: dict[int, Any] = {}  # memory by its address, held so that no other comes to lie there
        self._calls = _Calls(self)

    def waits(self, tensor: Tensor) -> bool:
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() not in self._host

    def put(self, tensor: Tensor, on_host: bool) -> Tensor:
        memory = tensor.untyped_storage()
        if on_host:
            self._host[memory.data_ptr()] = memory
        else:
            self._host.pop(memory.data_ptr(), None)
        return tensor

    def saw(self, name: str, args: Any) -> None:
        super().saw(name, args)
        self.read(name, args)

    def read(self, name: str, args: Any) -> None:
        if any(self.waits(t) for t in tree_leaves(args) if isinstance(t, Tensor)):
            self.reads.append(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        new = func.overloadpacket is aten.lift_fresh  # the last part of torch.tensor
        there = not new and any(self.waits(t) for t in given)
        if func.overloadpacket is aten.copy_ and not self.waits(args[0]):
            self.read("copy_", args[1])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (new or not func.is_view):  # a view is where its memory is
                self.put(tensor, not there)
        return out

    def __enter__(self) -> Any:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._calls.__exit__(*exc)


class _Calls(TorchFunctionMode):
    """For :class:`Reads`: calls between host and device, which on a CPU lead to no operator."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        out = func(*args, **kwargs)
        if kwargs.get("device") is not None and isinstance(out, Tensor):
            return self.reads.put(out, False)
        if name in ("tolist", "numpy", "__array__"):
            self.reads.read(name, args)
        elif name == "cpu" or (name == "to" and "cpu" in args):
            if not kwargs.get("non_blocking"):
                self.reads.read("cpu", args)
            return self.reads.put(out.clone(), True)
        elif name == "to" and any(isinstance(a, torch.device) for a in args) and not self.reads.waits(out):
            return self.reads.put(out.clone(), False)
        return out


def forward_and_backward(module: nn.Module, x: Tensor, dy: Tensor) -> list[str]:
    """Operators of a second run; the first one may fill what is kept."""
    for _ in range(2):
        x.grad = None
        module.zero_grad(set_to_none=True)
        with Operators() as operators:
            module(x).backward(dy)
    return operators.names
