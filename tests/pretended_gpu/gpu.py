# ruff: noqa: E402
"""The pretended GPU: a dispatch mode in which tensors on ``cuda:0`` have a shape, a dtype and no numbers.

Tensors on the CPU compute as ever. Whole numbers that came from the host (token ids, masks, positions) are computed
along on the host, so that what depends on them has the shapes that it would have; of all others the host reads 0, 1.0
or True.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

assert "torch" not in sys.modules, "the library comes first"
_device = ctypes.CDLL(os.environ["PRETENDED_GPU"], mode=ctypes.RTLD_GLOBAL)

import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.operators import ALLOCATIONS, INDEXED

_device.set_guard()
aten = torch.ops.aten
GPU = torch.device("cuda:0")
OF_UNKNOWN_SHAPE = {"nonzero", "masked_select", "bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
READ = {"_local_scalar_dense", "is_nonzero", "equal", "allclose"} | OF_UNKNOWN_SHAPE
ROOT = Path(__file__).parents[2]


class PretendedGPU(TorchDispatchMode):
    """Attributes:
    waits: what the host would have had to wait for, and the line of this repository that asked for it.
    operators: names of those on the GPU, without views and allocations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.operators: list[str] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> PretendedGPU:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "talklora_pl":
                module.type = _type  # type: ignore[attr-defined]
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) asks for its transfer openly
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        kwargs, packet, name = kwargs or {}, func.overloadpacket, func.overloadpacket.__name__
        if packet in (aten.pin_memory, aten._pin_memory):  # memory of the host
            return args[0].clone()
        leaves = tree_leaves((args, kwargs))
        given = [t for t in leaves if isinstance(t, FakeTensor)]
        new = any(isinstance(d, torch.device) and d.type == "cuda" for d in leaves)
        if not (given or new):
            return func(*args, **kwargs)
        if packet is aten._to_copy and torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type:
            return self._transferred(args[0], **kwargs)
        if packet is aten.copy_ and args[0].device.type != args[1].device.type:
            return self._copied(*args, **kwargs)
        if not func.is_view and packet is not aten._unsafe_view and packet not in ALLOCATIONS:
            self.operators.append(name)
        self._see(name, args, kwargs)
        known = _on_host(func, given, args, kwargs)
        if name in READ:
            return tree_map(self._made, known) if known is not None else self._guessed(name, args[0])
        if name in INDEXED:
            args = (args[0], [j for i in args[1] for j in self._places(i)], *args[2:])
        with self._fake:
            if packet is aten._grouped_mm and args[0].dtype != torch.bfloat16:  # of others the fake one knows nothing
                return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
            out = func(*args, **kwargs)
        numbers = tree_leaves(known)
        for i, t in enumerate(tree_leaves(out)):
            if isinstance(t, FakeTensor):
                t.numbers = numbers[i] if known is not None else None  # type: ignore[attr-defined]
        return out

    def wait(self, name: str) -> None:
        if _CUDAGraph.recording or _CUDAGraph.strict:
            raise RuntimeError(f"called a synchronizing CUDA operation: {name}")
        frames = [
            f for f in traceback.extract_stack() if f.filename.startswith((f"{ROOT}/talklora", f"{ROOT}/callbacks"))
        ]
        where = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else ""
        self.waits.append((name, where))

    def _see(self, name: str, args: Any, kwargs: Any) -> None:
        if name in READ or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)
        if name == "_grouped_mm" and args[0].dtype != torch.bfloat16:
            self.wait("_grouped_mm one after the other")
        if name in INDEXED:
            index = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in index):
                self.wait(f"{name} by a mask")
            if any(i.device.type == "cpu" for i in [*index, *args[2:3]]):
                self.wait(f"{name} with a tensor of the host")

    def _made(self, value: Any, dtype: torch.dtype | None = None) -> Any:
        """On the GPU, from one on the host (or the meta device)."""
        if not isinstance(value, Tensor):
            return value
        with self._fake:
            out = torch.empty_strided(value.size(), value.stride(), dtype=dtype or value.dtype, device=GPU)
        out.numbers = value.to(out.dtype, copy=True) if _counts(value) and _counts(out) else None  # type: ignore[attr-defined]
        return out

    def _transferred(
        self, source: Tensor, device: Any, dtype: torch.dtype | None = None, non_blocking: bool = False, **_: Any
    ) -> Tensor:
        dtype = dtype or source.dtype
        if source.device.type != "cuda":
            # a graph would read this memory of the host again when it is long gone
            if source.device.type == "cpu" and (not non_blocking or _CUDAGraph.recording):
                self.wait("to the GPU")
            return self._made(source, dtype)  # type: ignore[no-any-return]
        if torch.device(device).type == "meta":
            return torch.empty_strided(source.size(), source.stride(), dtype=dtype, device=device)
        if not non_blocking:
            self.wait("to the host")
        numbers: Tensor | None = getattr(source, "numbers", None)
        if numbers is None:
            guess = 0 if non_blocking else _guess(source)  # what is asked for later: did anything go wrong
            return torch.full(source.shape, guess, dtype=dtype)
        return numbers.to(dtype, copy=True)

    def _copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if target.device.type == "cpu":
            if not non_blocking:
                self.wait("to the host")
            numbers = getattr(source, "numbers", None)
            return target.fill_(_guess(source)) if numbers is None else target.copy_(numbers)
        if not non_blocking or _CUDAGraph.recording:
            self.wait("to the GPU")
        known = _counts(target) and _counts(source)
        target.numbers = source.to(target.dtype).expand(target.shape).clone() if known else None  # type: ignore[attr-defined]
        return target

    def _guessed(self, name: str, asked: Tensor) -> Any:
        """As if all entries were true and different from each other."""
        if name not in OF_UNKNOWN_SHAPE:
            return _guess(asked) if name == "_local_scalar_dense" else True
        shape = (asked.numel(), asked.dim()) if name == "nonzero" else (asked.numel(),)
        rows = self._made(torch.empty(shape, dtype=asked.dtype if name != "nonzero" else torch.long, device="meta"))
        if not name.lstrip("_").startswith("unique"):
            return rows
        return rows, self._made(torch.empty(asked.shape, dtype=torch.long, device="meta")), rows

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """An index by a mask as indices, which the kernel makes of it."""
        if index is None or index.dtype != torch.bool:
            return [index]
        numbers = getattr(index, "numbers", None)
        return [self._made(i) for i in (torch.ones(index.shape) if numbers is None else numbers).nonzero(as_tuple=True)]


def _type(value: Any, *more: Any, **options: Any) -> Any:
    """The package asks whether a tensor is a plain one; these are."""
    if isinstance(value, FakeTensor) and not more:
        return nn.Parameter if isinstance(value, nn.Parameter) else Tensor
    return builtins.type(value, *more, **options)


def _counts(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point and tensor.device.type != "meta" and tensor.numel() < 2**20


def _guess(tensor: Tensor) -> bool | float | int:
    return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 0


def _on_host(func: Any, given: list[Any], args: Any, kwargs: Any) -> Any:
    """What an operator gives whose numbers the host knows all; else None."""
    made_whole = kwargs.get("dtype") is not None and not kwargs["dtype"].is_floating_point
    if not (given or made_whole) or any(getattr(t, "numbers", None) is None for t in given):
        return None

    def here(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            return value.numbers  # type: ignore[attr-defined]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    out = func(*tree_map(here, args), **tree_map(here, kwargs))
    return out if all(_counts(t) for t in tree_leaves(out) if isinstance(t, Tensor)) else None


class _Event:
    """Recorded and reached: who waits for one waits for what came before it alone."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _CUDAGraph:
    """Has recorded nothing. While it does, or waits are to be errors, what the host waits for is one."""

    recording = False
    strict = False

    def replay(self) -> None: ...


@contextmanager
def _recorded(graph: _CUDAGraph, **options: Any) -> Iterator[None]:
    _CUDAGraph.recording = True
    try:
        yield
    finally:
        _CUDAGraph.recording = False


def _swapped(a: Tensor, b: Tensor) -> None:
    if (a.device, a.dtype) != (b.device, b.dtype):  # Module.to() of what is there already
        _swap(a, b)


_swap, torch.utils.swap_tensors = torch.utils.swap_tensors, _swapped
FakeTensor.data_ptr = lambda self: self.untyped_storage()._cdata
torch.cuda._lazy_init = lambda: None
torch.cuda.Event = _Event  # type: ignore[assignment,misc]
torch.cuda.CUDAGraph = _CUDAGraph  # type: ignore[misc]
torch.cuda.graph = _recorded  # type: ignore[assignment,misc]
torch.cuda.get_sync_debug_mode = lambda: 0
torch.cuda.set_sync_debug_mode = lambda mode: setattr(_CUDAGraph, "strict", mode == "error")  # type: ignore[assignment]
torch.cuda.stream = nullcontext  # type: ignore[assignment]
torch.cuda.graph_pool_handle = lambda: None  # type: ignore[assignment]
torch.cuda.is_current_stream_capturing = lambda: _CUDAGraph.recording
torch.cuda.current_stream = lambda *args: None  # type: ignore[assignment,return-value]
torch.cuda.get_device_capability = lambda *args: (9, 0)
torch.cuda.get_rng_state = lambda *args: torch.zeros(0)
torch.cuda.set_rng_state = lambda *args: None
torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
torch.cuda.max_memory_allocated = lambda *args: 0
for _kernel in ("flash", "mem_efficient", "cudnn"):  # which of them there is depends on the GPU
    getattr(torch.backends.cuda, f"enable_{_kernel}_sdp")(False)
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
