"""Bases whose frozen weights are kept in few bits, by the quantisation configurations of transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from talklora_pl.errors import UserError
from talklora_pl.internals.bitsandbytes import do_not_tell_of_casts
from talklora_pl.names import base_modules, base_parameters

SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""Values of ``model.base.quantization``, as options of ``BitsAndBytesConfig``: 4-bit NormalFloat (QLoRA, arXiv
2305.14314), the same with quantised scales, and 8-bit integers (LLM.int8, arXiv 2208.07339)."""


def quantization_config(name: str, dtype: Any) -> Any:
    """What ``from_pretrained`` takes.

    Args:
        name: a key of :data:`SCHEMES`.
        dtype: in which 4-bit layers multiply.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    check_installed(name)
    do_not_tell_of_casts()
    options = SCHEMES[name]
    return BitsAndBytesConfig(**options, **({"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in options else {}))


def stored_bytes(model: Any, name: str | None) -> dict[int, int]:
    """What the frozen weights of a model would take in few bits, by the id of the parameter; without the rest.

    Of weights and scales only: a block of 64 numbers has a scale in 4 bits, of 256 of these scales one is kept in full
    where they are quantised too, and in 8 bits every output has one. Embeddings, norms, the output embedding and the
    module that comes last (a head) stay as they are, which is the rule of transformers.

    Args:
        name: a key of :data:`SCHEMES`; with another, or None, nothing is known.
    """
    if name not in SCHEMES:
        return {}
    last = id(list(base_parameters(model).values())[-1])
    output = getattr(model, "get_output_embeddings", lambda: None)()
    kept = {last, id(getattr(output, "weight", None))}
    out = {}
    for module in base_modules(model):
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in kept:
            numbers, rows = module.weight.numel(), module.weight.shape[isinstance(module, Conv1D)]
            if name == "int8":
                out[id(module.weight)] = numbers + 4 * rows
            else:
                scales = -(-numbers // 64)
                of_scales = 4 * scales if name == "nf4" else scales + 4 * -(-scales // 256) + 4 * 256
                out[id(module.weight)] = -(-numbers // 2) + of_scales + 4 * 16
    return out


def check_installed(name: str) -> None:
    """Raises: UserError if what the scheme needs is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.base.quantization: {name} needs bitsandbytes: pip install 'talklora-pl[quant]'.")


def quantization_of(config: Any) -> str | None:
    """How the weights of a base are stored, by its configuration: a key of :data:`SCHEMES`, another method's own name,
    or None for plain floating-point weights."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    options: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if options.get("load_in_8bit"):
        return "int8"
    if options.get("load_in_4bit"):
        kind = str(options.get("bnb_4bit_quant_type", "fp4"))
        return f"{kind}_double" if options.get("bnb_4bit_use_double_quant") else kind
    method = options.get("quant_method")
    return str(getattr(method, "value", method))
