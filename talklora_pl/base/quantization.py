"""Bases whose frozen weights are kept in few bits, by the quantisation configurations of transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

from talklora_pl.errors import UserError
from talklora_pl.internals.bitsandbytes import do_not_tell_of_casts

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
