"""Small functions that several communication modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Norm = Literal["none", "layer", "rms"]
Activation = Literal["silu", "gelu", "relu", "tanh"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": F.tanh}


def normalise(m_TEF: Tensor, norm: Norm) -> Tensor:
    """Normalised over the features of every expert, without trained scale."""
    if norm == "layer":
        return F.layer_norm(m_TEF, m_TEF.shape[-1:])
    return F.rms_norm(m_TEF, m_TEF.shape[-1:]) if norm == "rms" else m_TEF
