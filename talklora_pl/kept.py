"""A value that is computed from tensors and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from talklora_pl.internals.torch import version

T = TypeVar("T")


class Kept(Generic[T]):
    """Computed once for the tensors that it comes from, as they are; without gradients.

    A tensor has changed if it lies elsewhere or its version counter has moved, as every operation of PyTorch in place
    does. (Writing through ``p.data`` moves no counter, for autograd neither; :meth:`forget` is for such code.)
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Compute anew the next time."""
        self._key: tuple[Any, ...] = ()
        # no other tensor can come to lie where these are, as long as they are held
        self._sources: list[Tensor] = []
        self._value: T | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], T], *options: Any) -> T:
        """What ``make()`` gave for these sources and options."""
        if any(t.is_inference() or type(t) not in (Tensor, nn.Parameter) for t in sources):
            return make()  # no version counter, or no place in memory
        key = (*options, *((t.data_ptr(), version(t), t.dtype, t.device) for t in sources))
        if key != self._key or self._value is None:
            with torch.inference_mode(False), torch.no_grad():
                self._value = make()
            self._key, self._sources = key, [t.detach() for t in sources]
        return self._value

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return Kept, ()  # copies and pickles begin empty
