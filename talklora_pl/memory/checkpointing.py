"""What the forward pass keeps for the backward pass, and what that computes again.

``full`` keeps the input of every decoder layer and runs the layer twice. ``selective`` also keeps what is dear to
compute, matrix products and fused attention, and runs the rest of the layer twice: norms, activations, rank space.
"""

from __future__ import annotations

import inspect
import weakref
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from talklora_pl.errors import UserError
from talklora_pl.internals.torch import PRODUCTS
from talklora_pl.sites.ffn import AdaptedFFN

Checkpointing = Literal["off", "full", "selective"]

CAN_SELECT = "op_output" in inspect.signature(SelectiveCheckpointContext).parameters
"""Whether this torch shows a policy what an operator has computed, which tells what is written into a kept product."""

MODES: tuple[Checkpointing, ...] = ("off", "selective", "full") if CAN_SELECT else ("off", "full")
"""What this torch can do, the most memory first."""


def mode_of(value: bool | str) -> Checkpointing:
    """The mode that an option means; ``true`` is ``full``, and YAML reads ``off`` as false.

    Raises:
        UserError: it is none, or one that this torch cannot do.
    """
    modes: dict[bool | str, Checkpointing] = {False: "off", True: "full", "off": "off", "full": "full"}
    modes["selective"] = "selective"
    if value not in modes:
        raise UserError(f"model.gradient_checkpointing: {value!r} is none of off, full and selective.")
    if modes[value] not in MODES:
        raise UserError(
            f"model.gradient_checkpointing: {value} needs torch 2.13 or newer; this is {torch.__version__}: use full."
        )
    return modes[value]


def checkpoint_layers(model: Any, mode: Checkpointing) -> None:
    """Let the decoder layers of a Hugging Face model be checkpointed, never reentrant.

    Raises:
        UserError: this model cannot.
    """
    for module in model.modules():
        if isinstance(module, AdaptedFFN):
            module.recompute = mode != "full"  # which computes all of the layer again already
    if mode == "off":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = selective_contexts
    try:
        model.activation_checkpointing_enable(options)
    except ValueError as e:
        raise UserError(f"model.gradient_checkpointing: {mode}: {e} Use off.") from None


def selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The two contexts of one checkpointed layer: around its forward pass, and around the second one.

    Where an operator writes into a product that is kept (a Linear's up projection is added to the frozen output), the
    product is kept as it is afterwards, and the operator is left out of the second pass.
    """
    kept: weakref.WeakSet[Any] = weakref.WeakSet()

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name, _, overload = operator.name().partition(".")
        out = context.op_output
        tensor = out[0] if isinstance(out, tuple) else out
        if name in PRODUCTS and overload != "out":  # what is written into a given tensor has to be written again
            kept.add(tensor.untyped_storage())
            return CheckpointPolicy.MUST_SAVE
        if name.endswith("_") and isinstance(out, torch.Tensor) and out.untyped_storage() in kept:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy, allow_cache_entry_mutation=True)
    return contexts
