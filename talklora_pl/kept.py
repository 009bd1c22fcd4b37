"""A value that is computed from tensors and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from talklora_pl.internals.torch import STAMP, is_as_stamped, stamp

T = TypeVar("T")


class Kept(Generic[T]):
    """Computed once for the tensors that it comes from, as they are; without gradients.

    A tensor has changed if it is another one, lies elsewhere or its version counter has moved, as every operation of
    PyTorch in place does. (Writing through ``p.data`` moves no counter, for autograd neither; :meth:`forget` is for
    such code.)
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Compute anew the next time."""
        self._stamps: list[STAMP] = []
        # no other memory can come to lie where theirs is, as long as it is held
        self._memory: list[Tensor] = []
        self._values: dict[Hashable, T] = {}

    def get(self, sources: Sequence[Tensor], make: Callable[[], T], option: Hashable = None) -> T:
        """What ``make()`` gave for these sources and this option."""
        if not self._values or not is_as_stamped(sources, self._stamps):
            if any(t.is_inference() or type(t) not in (Tensor, nn.Parameter) for t in sources):
                return make()  # no version counter, or no place in memory
            self._stamps, self._memory = [stamp(t) for t in sources], [t.detach() for t in sources]
            self._values = {}
        if option not in self._values:
            with torch.inference_mode(False), torch.no_grad():
                self._values[option] = make()
        return self._values[option]

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return Kept, ()  # copies and pickles begin empty
