"""The loss of many tokens a piece at a time, so that their logits are never there all at once.

Behind a frozen head the gradient of a piece's hidden states is made in the forward pass, together with its loss, and
its logits are forgotten: nothing is computed twice. The head is the model's own code, with all that it does to logits:
its body, the part before the head, is made to answer with the hidden states at hand.

N labelled tokens, n of one piece, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from talklora_pl import varlen
from talklora_pl.adapter.host import Adapted
from talklora_pl.inputs import causal_inputs, summed_cross_entropy, token_logits
from talklora_pl.names import ADAPTERS

MOST_ROWS = 4096
MOST_LOGITS = 2**26  # of a piece: 256 MB in float32

_plain_only: WeakSet[nn.Module] = WeakSet()  # models whose head takes something else than their body's last state


def label_nll(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every labelled token, in float32 at least, and the batch row of each, both (N,).

    Args:
        model: a causal language model.
        batch: as for :func:`~talklora_pl.inputs.token_logits`.
    """
    if (nll_N := _in_pieces(model, batch)) is not None:
        return nll_N, batch["loss_row"]
    logits_NV, targets_N, row_N = token_logits(model, batch)
    return token_nll(logits_NV, targets_N), row_N


def summed_nll(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Sum of :func:`label_nll` over the tokens, and their number."""
    if (nll_N := _in_pieces(model, batch)) is not None:
        return nll_N.sum(), len(nll_N)
    logits_NV, targets_N, _ = token_logits(model, batch)
    return summed_cross_entropy(logits_NV, targets_N), len(targets_N)


def token_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood of every target in float32 at least, (N,); in pieces, since such logits are large."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    pieces = zip(logits_NV.split(1024), targets_N.split(1024), strict=True)
    losses = [F.cross_entropy(logits.to(dtype), targets, reduction="none") for logits, targets in pieces]
    return torch.cat(losses) if losses else logits_NV.new_zeros(0, dtype=dtype)


def _in_pieces(model: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """What :func:`label_nll` gives; None where one piece is enough, or the head is trained along."""
    index_N = batch.get("loss_index")
    head = model.get_output_embeddings()
    if index_N is None or not isinstance(getattr(head, "weight", None), Tensor) or model in _plain_only:
        return None
    rows = min(MOST_ROWS, max(1, MOST_LOGITS // len(head.weight)))
    if len(index_N) <= rows:
        return None
    body = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(body, nn.Module) or body is model or _trained_outside(model, body):
        return None
    kept: list[Any] = []

    def keep(module: nn.Module, args: Any, out: Any) -> Any:
        h_ND = out.last_hidden_state.flatten(0, 1).index_select(0, index_N)
        kept.extend((out, h_ND))
        return _answer(out, h_ND[:1].detach())

    inputs = causal_inputs(model, batch)
    hook = body.register_forward_hook(keep)
    try:
        with varlen.packed("row_borders" in batch):
            logits = model(**inputs).logits
    finally:
        hook.remove()
    if not kept or logits.shape[:2] != (1, 1):
        _plain_only.add(model)
        return None
    out, h_ND = kept
    with _body_answers(body) as answer:

        def logits_of(h_nD: Tensor) -> Tensor:
            answer[:] = [_answer(out, h_nD)]
            logits_nV: Tensor = model.forward(**inputs).logits.squeeze(0)
            return logits_nV

        nll_N: Tensor = _Pieces.apply(h_ND, batch["loss_target"], logits_of, rows)
    return nll_N


def _trained_outside(model: nn.Module, body: nn.Module) -> bool:
    """Whether anything behind the body is trained."""
    inside = set(body.modules()) | set(getattr(model, ADAPTERS, nn.Module()).modules())
    outside = [m for m in model.modules() if m not in inside]
    trained = any(p.requires_grad for m in outside for p in m.parameters(recurse=False))  # also a weight that is tied
    return trained or any(isinstance(m, Adapted) for m in outside)


def _answer(out: Any, h_nD: Tensor) -> Any:
    """What the body gave, with other hidden states: one row of n tokens."""
    return type(out)(**{**out, "last_hidden_state": h_nD.unsqueeze(0)})


@contextmanager
def _body_answers(body: Any) -> Iterator[list[Any]]:
    """Inside, the body computes nothing: it gives what is in the list."""
    answer: list[Any] = []
    own = body.__dict__.get("forward")
    body.forward = lambda *args, **kwargs: answer[0]
    try:
        yield answer
    finally:
        del body.forward
        if own is not None:
            body.forward = own


class _Pieces(torch.autograd.Function):
    """nll_N of h_ND, by pieces of so many rows; each row's gradient is that of its own loss, times what comes back."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, targets_N: Tensor, logits_of: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        nll, dh = [], []
        for h_nD, targets_n in zip(h_ND.split(rows), targets_N.split(rows), strict=True):
            with torch.set_grad_enabled(wanted):
                h_nD = h_nD.detach().requires_grad_(wanted)
                nll_n = token_nll(logits_of(h_nD), targets_n)
                if wanted:
                    dh += torch.autograd.grad(nll_n.sum(), h_nD)
            nll.append(nll_n.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(dh))
        return torch.cat(nll)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
        (dh_ND,) = ctx.saved_tensors
        return (dh_ND * dnll_N.unsqueeze(1)).to(dh_ND.dtype), None, None, None
