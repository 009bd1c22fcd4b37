"""Every process holds the whole base and trains on its own rows; only the gradients of the adapters travel."""

import inspect
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

SYNC_BUFFERS = next(
    # the option's name since torch 2.13, and before
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class AdapterDDPStrategy(DDPStrategy):
    """``--trainer.strategy ddp``: Lightning's, without sending the base's constant buffers at every step.

    Args:
        timeout: how long a collective may wait for a lost peer before every process ends with an error.
        options: as of Lightning's strategy and of ``DistributedDataParallel``.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30), **options: Any) -> None:
        options[SYNC_BUFFERS] = False  # what a parser passes is the default of each option
        super().__init__(timeout=timeout, **options)
