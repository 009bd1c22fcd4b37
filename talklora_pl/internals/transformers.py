"""transformers 5, and accelerate 1, by which it places layers on devices."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils


def attention_of(config: Any) -> str | None:
    """Which attention implementation a model was built with; there is no public name for the outcome."""
    return getattr(config, "_attn_implementation", None)


def take_attention(config: Any, asked: Any) -> None:
    """Give `config` the attention implementation of `asked`, if that names one; there is only the argument of
    ``from_pretrained``, of which the caller is handed the outcome."""
    if (attention := getattr(asked, "_attn_implementation", None)) is not None:
        config._attn_implementation = attention


def use_eager_attention(config: Any) -> None:
    """Let a model that is built from ``config`` compute its attention by plain operations, which run anywhere.

    ``from_config`` of the auto classes has an argument for it, the model's own class has not.
    """
    config._attn_implementation = "eager"


def has_model(auto: Any, config: Any) -> bool:
    """Whether an auto class knows a model for the class of ``config``; it tells only by failing to load one."""
    return type(config) in auto._model_mapping


def gate(experts: Any, h_SG: Tensor) -> Tensor:
    """The activation that fused experts apply between their two projections; models replace this very method."""
    z_SH: Tensor = experts._apply_gate(h_SG)
    return z_SH


def whole_classes(model: nn.Module) -> set[str]:
    """Names of the classes of a model that must stay on one device: its decoder layers. Empty if it names none."""
    return set(getattr(model, "_no_split_modules", None) or ())


def mark_initialised(model: nn.Module) -> None:
    """Say of every tensor whether :func:`initialise` has to leave it alone: all but those on the meta device."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]


def initialise(model: Any, module: nn.Module) -> None:
    """Initialise what is not marked among a module's own tensors, as Hugging Face does for this model.

    The public ``initialize_weights`` goes over the whole model, whose tensors may be sharded.
    """
    model._init_weights(module)


def let_trainer_train(model: Any) -> None:
    """Have ``transformers.Trainer`` take a quantised model whose adapters it does not know.

    It asks for PEFT's own flag, which also makes ``save_pretrained`` look for PEFT's layers, or for a quantiser that
    says to be trainable by itself, which nothing else reads.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_qat_trainable:
        kind: Any = type(quantizer)
        quantizer.__class__ = _trainable(kind)


@functools.cache
def _trainable(cls: type) -> type:
    """A quantiser's class with the one property, which its own has no setter for."""
    names = {"is_qat_trainable": True, "__module__": cls.__module__}
    names["__reduce_ex__"] = lambda self, _: (_empty, (cls,), self.__dict__)  # pickle would look for it by its name
    return type(cls.__name__, (cls,), names)


def _empty(cls: type) -> Any:
    made: Any = _trainable(cls)
    return made.__new__(made)


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether accelerate replaced the module's ``forward`` by one that first moves its inputs to the right device."""
    return "_old_forward" in module.__dict__


def renew_accelerate_hook(module: Any) -> None:
    """After a change of the module's class: let accelerate's ``forward`` call that of the new one."""
    if has_accelerate_hook(module):
        module._old_forward = MethodType(type(module).forward, module)


def encodes_by_backend(tokenizer: Any) -> bool:
    """Whether the ids of a text are those of its ``backend_tokenizer`` and no class on the way changes them; a method
    between ``__call__`` and there is where those that do, do it."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )


rows_are_packed: ContextVar[bool | None] = ContextVar("rows_are_packed", default=None)
"""Whether the batch at hand is packed; None: nobody knows, and transformers looks at its positions."""

_look = masking_utils.find_packed_sequence_indices


def _find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
    known = None if torch.compiler.is_compiling() else rows_are_packed.get()
    if known is None:
        return _look(position_ids)
    return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1) if known else None


# Without a mask every forward pass looks whether positions begin anew, and waits for the device's answer; there is no
# argument that says so.
masking_utils.find_packed_sequence_indices = _find_packed_sequence_indices
