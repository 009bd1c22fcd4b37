"""One base for several runs in one process: loaded once, while every run gets a model of its own around the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_kept: dict[Any, Any] | None = None  # of one process: it loads one base at a time


@contextmanager
def shared_bases() -> Iterator[None]:
    """Inside, a base that was loaded before is not loaded again."""
    global _kept
    outer, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = outer


def shared(key: Any, load: Callable[[], nn.Module]) -> nn.Module:
    """What `load` gives; inside :func:`shared_bases` a copy of its modules around the same tensors.

    A run may train weights of the base in place (``modules_to_save``). So the base is loaded anew if any tensor was
    written to since (its version has changed), and trainable parameters are never shared.
    """
    if _kept is None:
        return load()
    from talklora_pl.internals.torch import is_as_stamped, stamp

    found = _kept.get(key)
    if found is None or not is_as_stamped(_tensors(found[0]), found[1]):
        _kept.clear()  # one base in memory, not two
        model = load()
        found = _kept[key] = model, [stamp(t) for t in _tensors(model)]
    return _copy(found[0])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _copy(model: nn.Module) -> nn.Module:
    from torch import nn

    memo: dict[int, Any] = {}
    for p in model.parameters():
        if not p.requires_grad:
            memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)  # same memory, same version
    return copy.deepcopy(model, memo)
