"""What the name of a module or tensor tells: which decoder layer it is in, what it is called there, whose it is."""

from __future__ import annotations

from torch import nn

ADAPTERS = "talklora"
"""The child of a model under which all its adapters are registered."""


def in_base(name: str) -> bool:
    """Whether ``name`` is that of a module or tensor of the base model, not of an adapter."""
    return not name.startswith(f"{ADAPTERS}.")


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a model without those of its adapters, by name."""
    return {name: p for name, p in model.named_parameters() if in_base(name)}


def base_modules(model: nn.Module) -> list[nn.Module]:
    """Modules of a model without those of its adapters, with itself."""
    return [module for name, module in model.named_modules() if in_base(f"{name}.")]


def leaf(name: str) -> str:
    """The last part, ``q_proj``."""
    return name.rpartition(".")[2]


def decoder_layer(name: str) -> str | None:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``: up to the first number; None outside of the layers."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()), None)


def layer_index(name: str) -> int | None:
    """Number of the decoder layer in a module name: its first numeric part."""
    layer = decoder_layer(name)
    return None if layer is None else int(leaf(layer))


def num_layers(model: nn.Module, name: str) -> int:
    """How many numbered layers the stack has that the module ``name`` is in; 0 outside of all."""
    layer = decoder_layer(name)
    if layer is None:
        return 0
    stack = model.get_submodule(layer.rpartition(".")[0])
    return sum(child.isdecimal() for child, _ in stack.named_children())


def kind_and_index(name: str) -> tuple[str, int | None]:
    """``model.layers.3.self_attn.q_proj`` -> (``self_attn.q_proj``, 3); modules outside of the layers have no index."""
    layer = decoder_layer(name)
    if layer is None:
        return name, None
    stack, _, index = layer.rpartition(".")
    return name[len(layer) + 1 :] or leaf(stack), int(index)
