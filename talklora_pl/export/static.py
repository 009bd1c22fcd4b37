"""An adapter that weighs its experts anew for every token, as one fixed low-rank change per Linear.

The change has the mean weights that the experts had on some data. How far it is from the adapter itself is what
:mod:`talklora_pl.export.fidelity` measures.

T tokens, E experts, P rank of a change, D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.adapter import Adapter, AdapterConfig, RoutingCollector, inject
from talklora_pl.adapter.adapters import adapter_set
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.errors import UserError
from talklora_pl.experts.lora import LoRA
from talklora_pl.export.merge import why_not
from talklora_pl.inputs import model_inputs, to_device
from talklora_pl.routers.softmax import Uniform
from talklora_pl.sites import LowRank

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank (its LoRAConfig)."""


def refuse_what_is_not_linear(config: AdapterConfig, experts_per_layer: dict[str, int]) -> bool:
    """Whether the adapter is a fixed change of the weights anyway, so that nothing is lost.

    Raises:
        UserError: it is none for fixed weights of its experts either.
    """
    several = [n for n, e in experts_per_layer.items() if e > 1]
    if several and (together := config.experts.site.nonlinear):
        raise UserError(
            f"--merge static: the mean of several {together} (as in {several[0]!r}) is not linear in the input, so no "
            "fixed weights make one block of them. Train experts per Linear (experts: lora), or run it unmerged."
        )
    if config.experts_see_talk and not config.communication.identity:
        raise UserError(
            f"--merge static: the experts use what communication {config.communication.name!r} makes of each token's "
            "features, which is not linear in the input. Train with experts_see_talk: false, or run it unmerged."
        )
    return why_not(config, experts_per_layer) is None


@dataclass
class MeanRouting:
    """Weights of one decision's experts over all tokens.

    Attributes:
        w_E: their mean.
        deviation: root of the mean squared distance of a token's weights from it; 0: no token differs.
    """

    w_E: Tensor
    deviation: float


@torch.no_grad()
def mean_routing(model: nn.Module, adapter: Adapter, batches: Iterable[Mapping[str, Any]]) -> dict[str, MeanRouting]:
    """Mean weights of the experts by the name of the module that decides; every token counts the same, pads do not.

    Args:
        model: in eval mode, with the adapter on.
        batches: as the adapter is trained on.
    """
    device = next(model.parameters()).device
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    tokens: dict[str, float] = {}
    for batch in batches:
        batch = to_device(batch, device)
        with RoutingCollector(adapter, batch["attention_mask"]) as collector:
            model(**model_inputs(batch))
        for r in collector.records:
            w_TE = r.routing.weights_TE.double()
            now = r.sum_of(w_TE), r.sum_of(w_TE.square().sum(-1))
            before = sums.get(r.layer)
            sums[r.layer] = now if before is None else (before[0] + now[0], before[1] + now[1])
            tokens[r.layer] = tokens.get(r.layer, 0.0) + float(r.mask_T.sum())
    out = {}
    for layer, (sum_E, squares) in sums.items():
        w_E = sum_E / tokens[layer]
        variance = float(squares) / tokens[layer] - float(w_E.square().sum())
        out[layer] = MeanRouting(w_E.float(), max(variance, 0.0) ** 0.5)
    return out


# --- ranks


@torch.no_grad()
def truncated(change: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """The nearest change of at most ``rank``, and its energy and that of the whole (squared Frobenius norms).

    The singular values of BᵀA are those of a P×P matrix, once both factors are orthogonalised.
    """
    Qa_DP, Ra_PP = torch.linalg.qr(change.A_PD.double().mT)
    Qb_OP, Rb_PP = torch.linalg.qr(change.B_PO.double().mT)
    U_PP, s_P, Vh_PP = torch.linalg.svd(Rb_PP @ Ra_PP.mT)
    root_P = s_P[:rank].sqrt()
    A_PD = root_P[:, None] * (Vh_PP[:rank] @ Qa_DP.mT)
    B_PO = root_P[:, None] * (Qb_OP @ U_PP[:, :rank]).mT
    energy_P = s_P.square()
    dtype = change.A_PD.dtype
    return LowRank(A_PD.to(dtype), B_PO.to(dtype)), float(energy_P[:rank].sum()), float(energy_P.sum())


def padded(change: LowRank, rank: int) -> LowRank:
    """The same with rows of zeros up to ``rank``."""
    more = rank - len(change.A_PD)
    return LowRank(*(torch.cat([m, m.new_zeros(more, m.shape[1])]) for m in change))


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM can be started with for adapters of this rank.

    Raises:
        UserError: there is none.
    """
    if rank > VLLM_RANKS[-1]:
        raise UserError(
            f"--for vllm: the merged rank is {rank}, and vLLM serves at most {VLLM_RANKS[-1]}. --rank "
            f"{VLLM_RANKS[-1]} (or less) truncates it."
        )
    return next(r for r in VLLM_RANKS if r >= rank)


# --- beside the adapter, in the same model


@torch.no_grad()
def add_static(model: nn.Module, changes: Mapping[str, LowRank], like: str = "default", name: str = "static") -> None:
    """Give ``model`` the changes as a second adapter and turn it on; it has the trained head of ``like``."""
    switch = adapter_set(model).switch
    saved = switch.values_of(like)
    rank = max(len(c.A_PD) for c in changes.values())
    config = AdapterConfig(
        targets=list(changes),
        num_experts=1,
        expert_rank=rank,
        dropout_input=0.0,
        experts=LoRA(),
        communication=NoCommunication(),
        router=Uniform(),
    )
    adapter = inject(model, config, name)
    for path, change in changes.items():
        experts: Any = adapter.layers.get_submodule(path).experts
        whole = padded(change, rank)
        experts.A.copy_(whole.A_PD[None])
        experts.B.copy_(whole.B_PO[None])
    for path, value in saved.items():
        switch.add_value(model, path, name, value)
    adapter.eval()
