"""PyTorch, 2.6 to 2.13. What has an underscore but never changed (``_parameters``) is used directly instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves  # the public one needs the package optree

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "FUSED",
    "PRODUCTS",
    "STAMP",
    "ReadFromOutside",
    "ShapesOnly",
    "TorchDispatchMode",
    "across",
    "cpu_has_bf16",
    "in_backward",
    "is_as_stamped",
    "own_part",
    "stamp",
    "step_unless",
    "tree_leaves",
    "version",
]

PRODUCTS = {
    f"aten::{name}"
    for name in (
        *("mm", "addmm", "_scaled_mm", "_grouped_mm"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    )
} | {"torch_attn::_varlen_attn"}
"""Operators that are dear to compute: matrix products, and attention as one kernel, which has no public operator. Not
``bmm``: the scores of eager attention are larger than all the rest together."""


class ShapesOnly:
    """Inside ``with ShapesOnly() as shapes:`` operators work out the shapes of their results and compute nothing.

    Tensors are made ready by ``shapes.of(tensor)``. They say that they are in main memory: on the meta device, which is
    public, autocast and the choice of an attention kernel fail. torch 2.0 to 2.13 have it under this name.
    """

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

        self._mode = FakeTensorMode()

    def __enter__(self) -> ShapesOnly:
        self._mode.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._mode.__exit__(*exc)

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor of this shape and dtype; of a parameter a parameter."""
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def own_part(tensor: DTensor) -> tuple[slice, ...]:
    """Which slice of the whole tensor this rank has, also where its local tensor is on the meta device."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # slow to import

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(o, o + s) for o, s in zip(offset, shape))


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices itself, without which it is slower than float32."""
    # looked up by name: torch for other machines than x86 may lack them
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def across(v_TF: Tensor, direction_TF: Tensor, length_T1: Tensor) -> Tensor:
    """v - d (v · d) / l² for every row: the gradient of d / |d| but for its scale, where l = |d|.

    As one operation: it is the gradient of ``weight_norm``, which PyTorch 1.0 to 2.13 have as one kernel of this name.
    """
    rows = torch.ops.aten._weight_norm_interface_backward
    out_TF: Tensor = rows(v_TF, direction_TF, length_T1, length_T1, 0)[0]
    return out_TF


FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
"""Optimisers with fused kernels; those that inherit from them may step in ways of their own."""


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> bool:
    """Let an optimiser leave out its next step if `bad`, float32 on the device, is 1 and not 0, without a wait.

    Fused kernels take that from gradient scalers, under this name; weights, moments and count of steps then stay as
    they are. torch 2.0 to 2.13 have it.

    Returns:
        Whether it will. An optimiser without fused kernels cannot: somebody has to read the number before the step.
    """
    if type(optimizer) not in FUSED or not all(group.get("fused") for group in optimizer.param_groups):
        return False
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    return True


class ReadFromOutside(TorchDispatchMode):
    """Memory that operators inside of the context read and have not made themselves.

    Attributes:
        memory: by an address, which torch 2.0 to 2.13 have under a private name; the public one fake tensors lack.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for memory in self._memory_of((args, kwargs)):
            if memory._cdata not in self._made:
                self.memory[memory._cdata] = memory
        out = func(*args, **(kwargs or {}))
        self._made.update(m._cdata for m in self._memory_of(out) if m._cdata not in self.memory)
        return out

    @staticmethod
    def _memory_of(values: Any) -> list[torch.UntypedStorage]:
        return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor)]


def version(tensor: torch.Tensor) -> int:
    """How often the memory of a tensor was written to, through whichever tensor that shares it."""
    return tensor._version


STAMP = tuple[torch.Tensor, int, int]


def stamp(tensor: torch.Tensor) -> STAMP:
    """By which :func:`is_as_stamped` knows a tensor again: itself, its version, its place."""
    return tensor, tensor._version, tensor.data_ptr()


def is_as_stamped(tensors: Sequence[torch.Tensor], stamps: Sequence[STAMP]) -> bool:
    """Whether these are the stamped tensors, unchanged. Asked for every adapted layer and token."""
    if len(tensors) != len(stamps):
        return False
    for tensor, (known, version, place) in zip(tensors, stamps):
        if tensor is not known or tensor._version != version or tensor.data_ptr() != place:
            return False
    return True


def in_backward() -> bool:
    """Whether this thread is in a backward pass, as the second pass of a checkpointed layer is.

    PyTorch's own ``checkpoint`` asks so, in 2.0 to 2.13; there is no public name.
    """
    return torch._C._current_graph_task_id() != -1


def compile_more_often(times: int) -> None:
    """Let ``torch.compile`` compile one function so often before it gives up; there is no public name for the limit."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, times)
