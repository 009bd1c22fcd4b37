"""Adapters that are one fixed low-rank matrix per Linear: into the weights, exactly. And why others are not.

P rank, D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from talklora_pl.adapter.adapters import adapter_set, get_adapter, remove_adapter
from talklora_pl.errors import UserError
from talklora_pl.sites import LowRank
from talklora_pl.sites.base_experts import is_mixture
from talklora_pl.sites.linear import LINEAR

if TYPE_CHECKING:
    from talklora_pl.adapter import Adapter, AdapterConfig

ALTERNATIVES = (
    "Run it unmerged: load_adapter, or from_pretrained on the exported folder. What merges: adapters with one expert "
    "per layer, and per-Linear experts with the router 'uniform'."
)


def why_not(config: AdapterConfig, experts_per_layer: dict[str, int]) -> str | None:
    """Why an adapter is no fixed change of the weights; None if it is one."""
    several = [n for n, e in experts_per_layer.items() if e > 1]
    if several and config.router.name != "uniform":
        return (
            f"router {config.router.name!r} weighs the experts anew for every token (as in {several[0]!r} with its "
            f"{experts_per_layer[several[0]]} experts), so no single matrix does what the adapter does"
        )
    if several and (together := config.experts.site.nonlinear):
        return f"the mean of several {together} (as in {several[0]!r}) is not linear in the input"
    if config.experts_see_talk and not config.communication.identity:
        return f"the experts use what communication {config.communication.name!r} makes of each token's features"
    return None


def low_rank(
    adapter: Adapter, layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor] | None = None
) -> dict[str, LowRank]:
    """The change of every Linear of an adapter for which :func:`why_not` is None, or whose weights are held fixed.

    Args:
        layers: adapter layers by name of the module that they adapt.
        weights: w_E of the experts, by name of the module that decides; where there is none it is 1/E.
    """
    known = weights or {}
    out: dict[str, LowRank] = {}
    for name, experts in adapter.experts_per_layer.items():
        site = LINEAR if name in adapter.plain_layers else adapter.config.experts.site
        layer: Any = layers[name]
        w_E = known.get(layer.decided_by, torch.full((experts,), 1 / experts))
        out |= site.low_rank(name, layer, w_E)
    return out


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
    merge_changes(model, low_rank(adapter, dict(adapter.layers.named_modules())), name)


@torch.no_grad()
def merge_changes(model: nn.Module, changes: Mapping[str, LowRank], name: str = "default") -> None:
    """Add changes to the frozen weights, and take the adapter that they stand for out of the model.

    Raises:
        UserError: as :func:`merged_weights`; then nothing has changed.
    """
    for weight, new in merged_weights(model, changes):
        weight.copy_(new)
    adapters = adapter_set(model)
    adapters.switch.active = name
    for parameter in adapters.switch.swapped.values():  # a trained head stays
        parameter.base = parameter.values.get(name, parameter.base)
    remove_adapter(model, name)


def merged_weights(model: nn.Module, changes: Mapping[str, LowRank]) -> list[tuple[nn.Parameter, Tensor]]:
    """Weights of the base that changes belong to, each with what it is after the change. Nothing is changed yet.

    Raises:
        UserError: a weight is quantised or shared.
    """
    merged: list[tuple[nn.Parameter, Tensor]] = []
    for path, change in changes.items():
        weight, transposed = _mergeable(model, path)
        delta_OD = change.B_PO.mT.double() @ change.A_PD.double()
        new = weight.double() + (delta_OD.mT if transposed else delta_OD)
        merged.append((weight, new.to(weight.dtype)))
    return merged


def _mergeable(model: nn.Module, path: str) -> tuple[nn.Parameter, bool]:
    """The weight of a Linear or of fused experts, and whether it is stored as (in, out)."""
    owner, _, last = path.rpartition(".")
    module: Any = model.get_submodule(owner)
    if is_mixture(module):
        transposed = module.is_transposed
    else:
        module, last = getattr(module, last), "weight"
        transposed = isinstance(module, Conv1D)
    weight = getattr(module, last)
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise UserError(
            f"The adapter cannot be merged: the weight of {path!r} is quantised. Merge into the base "
            f"in full precision (export CHECKPOINT --merge --base FULL_PRECISION). {ALTERNATIVES}"
        )
    owners = [n for n, m in model.named_modules() if getattr(m, last, None) is weight]
    if len(owners) > 1:
        raise UserError(f"The adapter cannot be merged: {' and '.join(owners)} share one weight. {ALTERNATIVES}")
    return weight, transposed
