"""What is linear is multiplied before any token comes: communication, scores and core become rows of one product.

The plain path computes h = x Aᵀ, lets the experts communicate, scores what they say and applies the core C, each for
every token. Where communication (talk) and scores G are linear, logits = x (G talk A)ᵀ and C h = x (C A)ᵀ, so that one
product of x with the stacked rows gives both. Parts say how they fold in methods of their own, beside the plain ones:
``LinearExperts.fold``, ``CommunicationModule.fold`` and ``ScoredRouter.route``.

T tokens, D input width, E experts, F features, R rank of an expert (S after the core), N = E logits, P = E R rows of
the down projection.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from talklora_pl.sites.fused import at_least_float32, product_dtype, without_autocast

_PLAIN = {"fold": frozenset({"forward", "split", "node_features", "mix"}), "route": frozenset({"forward"})}


def offers(part: Any, method: str) -> bool:
    """Whether ``part`` has the folded ``method``, and nobody changed or watches the plain ones that it stands for."""
    return not is_watched(part) and not _has_own(part, method) and _class_offers(_kind(part), method)


def _has_own(place: Any, method: str) -> bool:
    # torch 2.11 cannot compile isdisjoint of a set
    return any(name in vars(place) for name in _PLAIN[method])


def is_watched(part: Any) -> bool:
    """Whether hooks wait for the forward of a part."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def _kind(part: Any) -> Any:
    return type(part)


@functools.cache
def _class_offers(kind: type, method: str) -> bool:
    for cls in kind.__mro__:
        if method in vars(cls):
            return True
        if _has_own(cls, method):
            return False
    return False


def folds(experts: Any, communication: Any, router: Any) -> bool:
    """Whether the logits of a decision are affine in x, and its router starts from logits."""
    if not (offers(router, "route") and offers(experts, "fold")):
        return False
    scores = router.scores
    if is_watched(scores) or is_watched(communication):
        return False
    return scores.source == "x" or offers(communication, "fold")


def exact_enough(router: Any, dtype: torch.dtype) -> bool:
    """Whether a product in ``dtype`` gives the logits that ``router`` needs."""
    return dtype.itemsize >= 4 or not getattr(router, "selects", True)


def scores(experts: Any, communication: Any, router: Any) -> tuple[Tensor | None, Tensor | None]:
    """Weights on h and bias of the logits, (N,P) and (N,) or None; None twice where the logits come from x."""
    weight_NEG = router.scores.on_features()
    return (None, None) if weight_NEG is None else experts.fold(communication.fold(weight_NEG))


def logits(router: Any, product_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    """logits_TE from the product of x with the score rows; float32 at least."""
    logits_TE = product_TE.to(at_least_float32(product_TE.dtype))
    heated_TE: Tensor = router.scores.heated(logits_TE if bias_E is None else logits_TE + bias_E)
    return heated_TE


def logits_of(x_TD: Tensor, experts: Any, communication: Any, router: Any) -> Tensor:
    """logits_TE of a decision by itself, for an input."""
    weight_NP, bias_N = scores(experts, communication, router)
    rows_ND = router.scores.weight if weight_NP is None else weight_NP @ experts.down()
    dtype = product_dtype(x_TD)
    return logits(router, F.linear(x_TD.to(dtype), rows_ND.to(dtype)), bias_N)


def rank_rows(experts: Any) -> Tensor:
    """C A, or A where there is no core."""
    A_PD: Tensor = experts.down()
    core_ESR = getattr(experts, "core", None)
    if core_ESR is None:
        return A_PD
    return torch.bmm(core_ESR, A_PD.view(len(core_ESR), core_ESR.shape[2], -1)).flatten(0, 1)


def up_rows(experts: Any) -> Tensor:
    """Cᵀ B, or B where there is no core: for experts whose h is needed as it is."""
    B_QO: Tensor = experts.up()
    core_ESR = getattr(experts, "core", None)
    if core_ESR is None:
        return B_QO
    with without_autocast(B_QO.device.type):
        return torch.bmm(core_ESR.mT, B_QO.view(*core_ESR.shape[:2], -1)).flatten(0, 1)


class _CastUp(torch.autograd.Function):
    """A and s Cᵀ B in another dtype: one cast for both, and one for both gradients."""

    @staticmethod
    def forward(
        ctx: Any, A_PD: Tensor, core_ESR: Tensor, B_QO: Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(core_ESR, B_QO)
        ctx.scale = scale
        up_PO = _bmm(core_ESR.mT, B_QO.view(*core_ESR.shape[:2], -1), scale).flatten(0, 1)
        return _cast(A_PD, up_PO, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dA_PD: Tensor, dup_PO: Tensor) -> tuple[Tensor | None, ...]:
        core_ESR, B_QO = ctx.saved_tensors
        E, S, R = core_ESR.shape
        dA_PD, dup_PO = _cast(dA_PD, dup_PO, core_ESR.dtype)
        dup_ERO = dup_PO.view(E, R, -1)
        dcore_ESR = _bmm(B_QO.view(E, S, -1), dup_ERO.mT, ctx.scale)
        return dA_PD, dcore_ESR, _bmm(core_ESR, dup_ERO, ctx.scale).flatten(0, 1), None, None


def _bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.bmm(a, b) if scale == 1 else torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _cast(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = a.new_empty(a.shape, dtype=dtype), b.new_empty(b.shape, dtype=dtype)
    torch._foreach_copy_(out, (a, b))
    return out


def down_and_up_rows(experts: Any, scale: float, dtype: torch.dtype, fused: bool) -> tuple[Tensor, Tensor, float]:
    """A, Cᵀ B (or B) and what this is still to be multiplied with, for products in ``dtype``.

    Args:
        fused: as one node of the graph, which needs tensors that nothing transforms or traces.
    """
    A_PD, core_ESR = experts.down(), getattr(experts, "core", None)
    if core_ESR is None or dtype == A_PD.dtype or not fused:
        return A_PD, up_rows(experts), scale
    return *_CastUp.apply(A_PD, core_ESR, experts.up(), scale, dtype), 1.0


class _Rows(torch.autograd.Function):
    """[C A; G A] with no copy to stack them, and the gradients of A added up in place."""

    @staticmethod
    def forward(ctx: Any, A_PD: Tensor, core_ESR: Tensor, weight_NP: Tensor) -> Tensor:
        ctx.save_for_backward(A_PD, core_ESR, weight_NP)
        E, S, R = core_ESR.shape
        rows_MD = A_PD.new_empty(E * S + len(weight_NP), A_PD.shape[1])
        torch.bmm(core_ESR, A_PD.view(E, R, -1), out=rows_MD[: E * S].view(E, S, -1))
        # no mm: selective checkpointing keeps what mm returns and would leave this out when the rows are made again
        torch.bmm(weight_NP.unsqueeze(0), A_PD.unsqueeze(0), out=rows_MD[E * S :].unsqueeze(0))
        return rows_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_MD: Tensor) -> tuple[Tensor | None, ...]:
        A_PD, core_ESR, weight_NP = ctx.saved_tensors
        E, S, R = core_ESR.shape
        A_ERD, drank_ESD, dscore_ND = A_PD.view(E, R, -1), drows_MD[: E * S].view(E, S, -1), drows_MD[E * S :]
        dA_PD = torch.bmm(core_ESR.mT, drank_ESD).view_as(A_PD).addmm_(weight_NP.t(), dscore_ND)
        return dA_PD, torch.bmm(drank_ESD, A_ERD.mT), dscore_ND @ A_PD.t()


def rank_and_score_rows(experts: Any, weight_NP: Tensor, fused: bool) -> Tensor:
    """[C A; G A], G the weights on h of the logits; ``fused`` as in :func:`down_and_up_rows`."""
    A_PD, core_ESR = experts.down(), getattr(experts, "core", None)
    if core_ESR is None or not fused:
        return torch.cat([rank_rows(experts), weight_NP @ A_PD])
    rows_MD: Tensor = _Rows.apply(A_PD, core_ESR, weight_NP)
    return rows_MD


class _Split(torch.autograd.Function):
    """z and the logits as float32, with a gradient that is put together in one copy."""

    @staticmethod
    def forward(ctx: Any, product_TM: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.dtype = product_TM.dtype
        return product_TM[:, :width], product_TM[:, width:].to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_TP: Tensor, dlogits_TE: Tensor) -> tuple[Tensor, None, None]:
        out_TM = dz_TP.new_empty(len(dz_TP), dz_TP.shape[1] + dlogits_TE.shape[1], dtype=ctx.dtype)
        return torch.cat([dz_TP, dlogits_TE], dim=1, out=out_TM), None, None


def split(product_TM: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """z_TP and logits_TE, these as float32 at least."""
    dtype = at_least_float32(product_TM.dtype)
    if dtype == product_TM.dtype or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        z_TP, logits_TE = product_TM.narrow(1, 0, width), product_TM.narrow(1, width, product_TM.shape[1] - width)
        return z_TP, logits_TE.to(dtype)
    z_TP, logits_TE = _Split.apply(product_TM, width, dtype)
    return z_TP, logits_TE
