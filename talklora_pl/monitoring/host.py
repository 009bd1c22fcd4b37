"""How a training step's numbers come to the host: all together, because it waits for the device each time it asks; or
later, when the device is long done with them."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

from talklora_pl.internals.lightning import logged_values, put_logged_value


def waits(tensor: Tensor) -> bool:
    """Whether a number of this tensor is there only after a wait."""
    return tensor.device.type != "cpu"


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, bit for bit; those of one device come in one transfer."""
    found = [t.detach() for t in tensors]
    # a tensor of a sharded model knows itself how its parts are put together
    away = [i for i, t in enumerate(found) if type(t) is Tensor and waits(t)]
    for device in {found[i].device for i in away}:
        here = [i for i in away if found[i].device == device]
        # as bytes, the one thing that losses, counts and flags have in common
        parts = [found[i].reshape(-1).contiguous().view(torch.uint8) for i in here]
        copies = torch.cat(parts).cpu().split([len(part) for part in parts])
        for i, copy in zip(here, copies, strict=True):
            found[i] = copy.clone().view(found[i].dtype).reshape(found[i].shape)
    return found


def read_back(trainer: L.Trainer, more: Sequence[Tensor] = ()) -> list[Tensor]:
    """Let the host have all that the step has logged so far; the loggers and the progress bar then wait no more.

    Args:
        more: what else is wanted now, for the same wait.

    Returns:
        ``more`` on the CPU.
    """
    logged = [(holder, value) for holder, value in logged_values(trainer) if waits(value)]
    found = to_host([*(value for _, value in logged), *more])
    for (holder, _), value in zip(logged, found):
        put_logged_value(holder, value)
    return found[len(logged) :]


class Later:
    """A tensor whose copy to the host is under way; reading it waits for what the device had to do until now, no more.

    :func:`to_host` would wait for what it is given from now on as well.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # from a GPU, into pinned memory
        self._there = None
        if tensor.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The copy."""
        if self._there is not None:
            self._there.synchronize()
        return self._copy
