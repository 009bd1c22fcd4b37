"""Lightning callbacks; imported as ``talklora_pl.callbacks``."""

from talklora_pl.callbacks.checkpoint import Checkpoint
from talklora_pl.callbacks.load_balance import LoadBalance

__all__ = ["Checkpoint", "LoadBalance"]
