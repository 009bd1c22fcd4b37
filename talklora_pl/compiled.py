"""Decoder layers compiled one by one, each as one graph.

A model has many layers and few kinds of them: layers of one kind share what was compiled. Attention masks, the head and
the loss stay outside, so neither lengths nor labels compile anything anew. Compiled are training passes; evaluation and
generation, with their caches and lengths of all sorts, run as they are.

Gradient checkpointing and FSDP2 wrap the compiled layer from outside: its class is exchanged for a subclass, which
transformers wraps like any other.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.adapter import Adapter
from talklora_pl.distributed.fsdp import decoder_layers
from talklora_pl.errors import UserError, in_a_line
from talklora_pl.internals.torch import compile_more_often
from talklora_pl.same_gradients import difference

BACKEND = "inductor"


class CompiledLayers:
    """The decoder layers of ``model``, compiled when they first train.

    Args:
        model: with its adapter.
        backend: of ``torch.compile``.

    Attributes:
        on: off, every layer runs as it is.

    Raises:
        UserError: the model does not say what its layers are.
    """

    def __init__(self, model: nn.Module, backend: str = BACKEND) -> None:
        try:
            self.layers = decoder_layers(model)
        except UserError:
            raise UserError(
                f"model.compile: layers: {type(model).__name__} does not name its layers (it has no "
                "_no_split_modules). Use model.compile: model or off."
            ) from None
        # each kind of layer is compiled for itself, and another shape of the same code is no reason to give up
        compile_more_often(64)
        # of ours, which remember what a class is and nothing that changes
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        self._adapters = [a for a in model.modules() if isinstance(a, Adapter)]
        self.on = True
        classes: dict[type, type] = {}
        for layer in self.layers:
            cls = type(layer)
            if cls not in classes:
                classes[cls] = self._class_of(cls, backend)
            layer.__class__ = classes[cls]

    @property
    def on(self) -> bool:
        return self._on

    @on.setter
    def on(self, value: bool) -> None:
        self._on = value
        for adapter in self._adapters:  # compiled layers fuse what layers as they are make together
            adapter.together.on = not value

    def _class_of(self, cls: Any, backend: str) -> type:
        compiled: Callable[..., Any] = torch.compile(cls.forward, backend=backend, fullgraph=True, dynamic=True)

        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (compiled if self.on and layer.training else cls.forward)(layer, *args, **kwargs)

        return type(f"Compiled{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__})

    def why_not_trusted(self, trained: list[nn.Parameter], loss: Callable[[], Tensor]) -> str:
        """Compare the gradients of compiled layers with those of layers as they are, on one batch.

        Args:
            trained: what is differentiated by.
            loss: computes the loss, with all that trains.

        Returns:
            what is wrong, or an empty string.
        """

        def gradients(on: bool) -> list[Tensor | None]:
            self.on = on
            return list(torch.autograd.grad(loss(), trained, allow_unused=True))

        logged = logging.root.manager.disable
        logging.disable(logging.ERROR)  # the compiler's own account of what it cannot take
        try:
            dtype = next(self.layers[0].parameters()).dtype
            return difference(trained, lambda: gradients(False), lambda: gradients(True), dtype)
        except Exception as e:  # what a compiler says of code that it cannot take has no type of its own
            return f"they cannot be compiled ({in_a_line(e)})"
        finally:
            logging.disable(logged)
