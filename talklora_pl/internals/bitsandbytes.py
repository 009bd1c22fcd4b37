"""bitsandbytes, 0.50: 4-bit layers on a CPU."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "inputs will be cast" not in record.getMessage()


def do_not_tell_of_casts() -> None:
    """An 8-bit layer says at every forward that it multiplies in float16."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(f, _Quiet) for f in logger.filters):
        logger.addFilter(_Quiet())


def stay_differentiable(model: nn.Module) -> str | None:
    """Keep the 4-bit layers of a model as they are when it is evaluated; the name of one that has changed already.

    On a CPU with AVX512-BF16 such a layer repacks its weight, and rounds its scales, at its first forward in eval mode,
    into a form whose product has no gradient for the input: autograd then leaves that term out in silence. The layer
    has no option for it, only the attribute by which it remembers what the CPU can do.
    """
    for name, module in model.named_modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                return str(name)
            layer.support_avx512bf16_for_cpu = False
    return None
