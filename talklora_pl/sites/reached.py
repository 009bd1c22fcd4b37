"""Which Linears does the loss of a text reach? Found out by one trial pass of a copy that has no weights.

A tower for images is never called on a text. Nor are some Linears of language models, such as Mamba's ``dt_proj``,
whose weight the model multiplies itself. An adapter would learn nothing there, and DistributedDataParallel would wait
for gradients that never come.

T tokens, D input width, O output width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from talklora_pl.errors import in_a_line
from talklora_pl.internals.transformers import use_eager_attention
from talklora_pl.sites.targets import is_linear, widths

TOKENS = 2

_known: dict[tuple[type, str], frozenset[str] | TrialFailed] = {}


class TrialFailed(Exception):
    """The trial pass cannot be made; the text says why."""


def unreached(model: nn.Module) -> frozenset[str]:
    """Names of the Linears of ``model`` whose output does not take part in its loss on a text.

    The copy has the model's configuration and all of its layers, but its weights are views of a single zero: it takes
    next to no memory, and the weights of ``model`` are not looked at (they may be on the meta device). An expert of the
    base's own mixture that the trial did not choose counts as reached if another one was chosen. Of a model that is not
    built from a Hugging Face configuration nothing is known, and all of it counts as reached.

    Raises:
        TrialFailed: the copy cannot be built or run.
    """
    if not isinstance(model, PreTrainedModel):
        return frozenset()
    key = (type(model), model.config.to_json_string(use_diff=False))
    if key not in _known:
        try:
            with torch.device("cpu"):  # whatever the default device is
                _known[key] = _try(type(model), model.config)
        except Exception as e:  # model code fails in ways of its own
            _known[key] = TrialFailed(in_a_line(e))
    known = _known[key]
    if isinstance(known, TrialFailed):
        raise known
    return known


def _try(cls: Any, config: PreTrainedConfig) -> frozenset[str]:
    config = copy.deepcopy(config)
    use_eager_attention(config)  # what the others need may be no CPU
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if isinstance(part, PreTrainedConfig):
            for option in [o for o in vars(part) if o.endswith("chunk_size")]:
                setattr(part, option, TOKENS)  # state space models fill a text up to it
    with torch.random.fork_rng(devices=[]), no_init_weights(), _Weightless():
        trial = cls(config)
    trial.eval().requires_grad_(False)
    linears = {n: m for n, m in trial.named_modules() if is_linear(m)}
    marks = {n: torch.zeros((), requires_grad=True) for n in linears}
    for name, module in linears.items():
        own = None if type(module).forward in (nn.Linear.forward, Conv1D.forward) else module.forward
        module.forward = partial(_linear, widths(module)[1], marks[name], own)
    for module in trial.modules():
        if any(p.dim() == 3 and n.endswith("down_proj") for n, p in module.named_parameters(recurse=False)):
            module.forward = _fused_experts
    ids_1T = torch.arange(1, TOKENS + 1).unsqueeze(0)
    with torch.enable_grad():
        out = trial(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False, return_dict=True)
        out.logits.sum().backward()
    reached = {_any_expert(n) for n, mark in marks.items() if mark.grad is not None}
    return frozenset(n for n in linears if _any_expert(n) not in reached)


def _any_expert(name: str) -> str:
    """One name for all experts of a layer: each number after that of the layer becomes ``*``."""
    first = re.search(r"\.\d+\.", name)
    return name if first is None else name[: first.end()] + re.sub(r"\b\d+\b", "*", name[first.end() :])


def _linear(out_features: int, mark: Tensor, own: Callable[..., Any] | None, x_TD: Tensor) -> Any:
    """Zeros (..., O) through which a gradient reaches ``mark`` and x."""
    if own is not None and not isinstance(y := own(x_TD), Tensor):
        return y  # a subclass that is no Linear, such as the router of Llama 4: nothing can be added to its output
    return x_TD.new_zeros(*x_TD.shape[:-1], out_features) + (mark + 0 * x_TD.sum(-1, keepdim=True))


def _fused_experts(x_TD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Zeros (..., D) through which a gradient reaches x and the routing weights."""
    return 0 * x_TD + sum(0 * a.sum() for a in (*args, *kwargs.values()) if isinstance(a, Tensor))


class _Weightless(TorchFunctionMode):
    """New tensors are zero, large ones views of a single zero, to which nothing is written."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn):
            meta = func(*args, **kwargs | {"device": "meta"})
            if meta.numel() >= 2**16 and "out" not in kwargs:
                return torch.zeros((), dtype=meta.dtype).expand(meta.shape)
            return torch.zeros(meta.shape, dtype=meta.dtype) if func is torch.empty else func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Tensor) and 0 in args[0].stride():
            return args[0]
        return func(*args, **kwargs)
