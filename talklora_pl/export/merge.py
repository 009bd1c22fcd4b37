"""Adapters that are one fixed low-rank matrix per Linear: into the weights, exactly. And why others are not.

P rank, D input width, O output width, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from talklora_pl.adapter.ffn import AdaptedFFN
from talklora_pl.adapter.host import adapter_set, get_adapter, remove_adapter
from talklora_pl.adapter.layers import AdaptedLinear
from talklora_pl.errors import UserError

if TYPE_CHECKING:
    from talklora_pl.adapter.config import AdapterConfig

ALTERNATIVES = (
    "Run it unmerged: load_adapter, or from_pretrained on the exported folder. What merges: adapters with one expert "
    "per layer, and per-Linear experts with the router 'uniform'."
)


class LowRank(NamedTuple):
    """y += x Aᵀ B."""

    A_PD: Tensor
    B_PO: Tensor


def why_not(config: AdapterConfig, experts_per_layer: dict[str, int]) -> str | None:
    """Why an adapter is no fixed change of the weights; None if it is one."""
    several = [n for n, e in experts_per_layer.items() if e > 1]
    if several and config.router.name != "uniform":
        return (
            f"router {config.router.name!r} weighs the experts anew for every token (as in {several[0]!r} with its "
            f"{experts_per_layer[several[0]]} experts), so no single matrix does what the adapter does"
        )
    if several and config.experts.site == "ffn":
        return f"the mean of several whole feed-forward blocks (as in {several[0]!r}) is not linear in the input"
    if config.experts_see_talk and not config.communication.identity:
        return f"the experts use what communication {config.communication.name!r} makes of each token's features"
    return None


def low_rank(adapter: Any, layers: dict[str, nn.Module]) -> dict[str, LowRank]:
    """The change of every Linear of an adapter for which :func:`why_not` is None.

    Args:
        layers: adapter layers by name of the module that they adapt.
    """
    out: dict[str, LowRank] = {}
    for name, layer in layers.items():
        if isinstance(layer, AdaptedFFN):
            out |= _of_block(name, layer)
        elif isinstance(layer, AdaptedLinear):
            out[name] = _of_experts(layer.experts, adapter.experts_per_layer[name], layer.scale)
    return out


@torch.no_grad()
def _of_experts(experts: Any, num_experts: int, scale: float) -> LowRank:
    """Rank space is linear once the weights are fixed: its matrix is what it makes of the unit vectors."""
    A_PD = experts.down()
    unit_PP = torch.eye(A_PD.shape[0], device=A_PD.device, dtype=A_PD.dtype)
    w_PE = A_PD.new_full((A_PD.shape[0], num_experts), 1 / num_experts)
    z_PQ = experts.mix(experts.split(unit_PP), w_PE)
    return LowRank(A_PD, scale * z_PQ @ experts.up())


def _of_block(name: str, layer: AdaptedFFN) -> dict[str, LowRank]:
    gate, up, down = (
        _of_experts(e, 1, layer.scale) for e in (layer.experts.gate, layer.experts.up, layer.experts.down)
    )
    parts = layer.parts
    out = {f"{name}.{parts.down}": down}
    if parts.up is not None:
        return out | {f"{name}.{parts.gate}": gate, f"{name}.{parts.up}": up}
    both = LowRank(torch.cat([gate.A_PD, up.A_PD]), torch.block_diag(gate.B_PO, up.B_PO))
    return out | {f"{name}.{parts.gate}": both}


@torch.no_grad()
def merge_adapter(model: nn.Module, name: str = "default") -> None:
    """Add an adapter to the frozen weights and take it out of the model, which then computes the same without it.

    Exact up to the rounding of the weights' dtype. On any error the model is left as it was.

    Raises:
        UserError: the adapter is no fixed change of the weights (with the reason and the alternatives), other adapters
            are loaded, or the weights are quantised or shared.
    """
    adapter = get_adapter(model, name)
    if reason := why_not(adapter.config, adapter.experts_per_layer):
        raise UserError(f"The adapter {name!r} cannot be merged: {reason}. {ALTERNATIVES}")
    adapters = adapter_set(model)
    if others := [n for n in adapters if n != name]:
        raise UserError(f"Merging {name!r} would change what {others[0]!r} was trained on; remove that adapter first.")
    layers: dict[str, nn.Module] = {
        n: m for n, m in adapter.layers.named_modules() if isinstance(m, (AdaptedLinear, AdaptedFFN))
    }
    merged: list[tuple[nn.Parameter, Tensor]] = []
    for path, change in low_rank(adapter, layers).items():
        weight = _mergeable(model, path)
        delta_OD = change.B_PO.t().double() @ change.A_PD.double()
        new = weight.double() + (delta_OD.t() if isinstance(model.get_submodule(path), Conv1D) else delta_OD)
        merged.append((weight, new.to(weight.dtype)))
    for weight, new in merged:
        weight.copy_(new)
    adapters.switch.active = name
    for along in adapters.switch.along.values():  # a trained head stays
        along.base = along.values.get(name, along.base)
    remove_adapter(model, name)


def _mergeable(model: nn.Module, path: str) -> nn.Parameter:
    weight = model.get_submodule(path).weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise UserError(f"The adapter cannot be merged: the weight of {path!r} is quantised. {ALTERNATIVES}")
    owners = [n for n, m in model.named_modules() if getattr(m, "weight", None) is weight]
    if len(owners) > 1:
        raise UserError(f"The adapter cannot be merged: {' and '.join(owners)} share one weight. {ALTERNATIVES}")
    return weight
