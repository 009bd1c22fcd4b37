"""What a causal model hears of other tokens, found out by one trial pass and not by its name.

A derivative that is exactly zero says more than two outputs that are nearly equal: attention weights that a mask takes
away are zeros. Both trials run the base alone, on a few tokens, and leave no trace.

S and T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from talklora_pl import varlen
from talklora_pl.adapter.adapters import base_alone
from talklora_pl.errors import in_a_line
from talklora_pl.internals.transformers import attention_of

ROWS = (3, 5)  # tokens of the trial's two rows

_reads_back: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def reads_back_only(model: Any) -> bool:
    """Whether no token of ``model`` hears those behind it, called without a mask. A model that fails is said to."""
    if model not in _reads_back:
        try:
            with _trial(model):
                ids_1S = _tokens(model, ROWS[1])
                logits_1SV, x_1SD = _run(model, {"input_ids": ids_1S})
                heard_1SD = _derivative(logits_1SV[:, :-1], x_1SD)
            # a model that hears nothing at all has been asked the wrong way
            _reads_back[model] = bool(heard_1SD[:, :-1].any()) and not bool(heard_1SD[:, -1].any())
        except Exception:  # model code fails in ways of its own; with the mask it is called as ever
            _reads_back[model] = False
    return _reads_back[model]


def rows_not_kept_apart(model: Any) -> str:
    """Why ``model`` cannot compute packed rows as it computes each of them alone; empty if it can."""
    a, b = ROWS
    try:
        with _trial(model):
            ids_1T = _tokens(model, a + b)
            positions_1T = torch.cat([torch.arange(n, device=ids_1T.device) for n in ROWS]).unsqueeze(0)
            borders = torch.tensor([0, a, a + b], dtype=torch.int32, device=ids_1T.device)
            inputs = {"input_ids": ids_1T, "position_ids": positions_1T, **varlen.arguments(model, borders, b)}
            with varlen.packed(True):
                logits_1TV, x_1TD = _run(model, inputs)
            heard_1TD = _derivative(logits_1TV[:, a:], x_1TD)
            alone_1SV, _ = _run(model, {"input_ids": ids_1T[:, a:]})
            if attention_of(model.config) == varlen.NAME:
                _train_once(model, inputs)
        if bool(heard_1TD[:, :a].any()):
            return "a row hears the one before it"
        tolerance = 1e-3 if torch.finfo(alone_1SV.dtype).bits > 16 else 5e-2
        if not bool((logits_1TV[:, a:] - alone_1SV).abs().max() <= tolerance * alone_1SV.abs().max()):
            return "the second row does not get the logits that it has alone"
    except Exception as e:
        return in_a_line(e)
    return ""


def prepare_for_packed_rows(model: Any) -> tuple[str, str]:
    """Give ``model`` the best attention for packed rows that it passes the trial with.

    Returns:
        what its attention is now called, and why it cannot have packed rows (empty if it can).
    """
    attention = attention_of(model.config) or "its own attention"
    # of a base whose shards are in main memory the adapter is on the GPU
    if attention == "sdpa" and any(p.is_cuda for p in model.parameters()):
        model.set_attn_implementation(varlen.NAME)
        if not rows_not_kept_apart(model):
            return "the variable-length kernel of torch", ""
        model.set_attn_implementation(attention)
    by_mask = attention in ("eager", "sdpa")
    return f"{attention}, with a block-diagonal mask" if by_mask else attention, rows_not_kept_apart(model)


@contextmanager
def _trial(model: nn.Module) -> Iterator[None]:
    training = [(m, m.training) for m in model.modules()]
    stance = torch.compiler.set_stance("force_eager")
    try:
        model.eval()
        with base_alone(model), stance, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, was in training:
            module.training = was


def _tokens(model: Any, count: int) -> Tensor:
    embedding = model.get_input_embeddings()
    return torch.arange(1, count + 1, device=embedding.weight.device).remainder(embedding.num_embeddings).unsqueeze(0)


def _run(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits, and the embeddings that they can be differentiated by."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        kept.append(out.detach().requires_grad_())
        return kept[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        hook.remove()
    return logits, kept[0]


@torch.no_grad()
def _train_once(model: Any, inputs: dict[str, Any]) -> None:
    """In training mode attention may have dropout, which the kernel for packed rows has not. Random numbers go on as if
    none had been drawn."""
    device = inputs["input_ids"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), varlen.packed(True):
        model.train()(**inputs)


def _derivative(logits: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(logits.float().square().sum(), x)[0]
