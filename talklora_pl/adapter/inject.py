"""Put an adapter into a frozen model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from talklora_pl import registry
from talklora_pl.adapter.allocation import decide
from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.adapter.host import Adapted, AdapterSet, attach
from talklora_pl.adapter.layers import AdaptedLinear
from talklora_pl.adapter.targets import find_targets, layer_index, widths
from talklora_pl.allocation.weights import ModuleWeights
from talklora_pl.errors import UserError
from talklora_pl.spec import Bank, LayerSpec


class Adapter(nn.Module):
    """Everything that is trained: one module per adapted layer, what they share, and the balance losses.

    Tensor names are ``layers.<module name in the base>.<part>.<tensor>``, ``bank.<kind>.<tensor>`` and
    ``balance.<loss>.<tensor>``; they are frozen per format version.

    Attributes:
        config: the options it was built from.
        experts_per_layer: number of experts of every adapted module, by full name.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.experts_per_layer: dict[str, int] = {}
        self.bank = Bank()
        self.layers = nn.Module()
        self.balance = nn.ModuleDict()

    def routed_layers(self) -> dict[str, int]:
        """Number of experts of the layers that have something to decide, by name."""
        return {n: e for n, e in self.experts_per_layer.items() if e > 1}


def _add(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register ``module`` under a dotted name, with plain containers on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(leaf, module)


def inject(
    model: nn.Module,
    config: AdapterConfig,
    name: str = "default",
    allocation: Mapping[str, int] | None = None,
    device: torch.device | str | None = None,
) -> Adapter:
    """Freeze ``model``, give it the adapter that ``config`` describes and turn it on.

    Every layer's tensors are drawn from the current seed and the layer's name, so that they depend neither on the
    order of layers nor on the process, and methods that differ in one part start equal in the others.

    Args:
        allocation: experts by module name; by default what the configured rule decides from the model's own weights.
        device: of the trained tensors; by default that of the layer they belong to.

    Raises:
        UserError: bad options, or targets that match nothing.
    """
    config.validate()
    adapters = getattr(model, "talklora", None)
    if isinstance(adapters, AdapterSet) and name in adapters:
        raise UserError(f"The model has an adapter {name!r} already; remove it or choose another name.")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"{name!r} cannot be an adapter's name; use letters, digits and underscores.")
    if allocation is None:
        allocation = decide(config, model, ModuleWeights(model))
    adapter = Adapter(config)
    built: dict[str, tuple[nn.Module, nn.Module]] = {}
    for part in (config, config.plain_config()):
        if part is not None:
            built.update(_build(model, part, adapter, allocation if part is config else None, device))
    for also in config.also_train:
        if not any(f".{also}." in f".{n}" for n, _ in model.named_parameters()):
            children = [n for n, _ in model.named_children()]
            raise UserError(f"also_train: this model has no module {also!r}.{registry.did_you_mean(also, children)}")
    for loss in config.balance:
        if not adapter.routed_layers():
            raise UserError(
                f"balance loss {loss.name!r}: with one expert per layer there is nothing to balance; remove it."
            )
        if loss.name in adapter.balance:
            raise UserError(f"balance loss {loss.name!r} is listed twice.")
        adapter.balance[loss.name] = loss.build(adapter.routed_layers())

    # nothing of the model was touched before this line, so that an error above leaves it as it was
    for n, p in model.named_parameters():
        if not n.startswith("talklora."):
            p.requires_grad_(any(f".{a}." in f".{n}" for a in config.also_train))
    if not isinstance(adapters, AdapterSet):
        adapters = AdapterSet()
        model.add_module("talklora", adapters)
    for module, layer in built.values():
        attach(module, adapters.switch, name, layer)
    adapters[name] = adapter
    adapters.switch.active = name
    adapter.train(model.training)
    return adapter


def _build(
    model: nn.Module, config: AdapterConfig, adapter: Adapter, allocation: Mapping[str, int] | None, device: Any
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Adapter layers by module name, registered in ``adapter`` but not yet attached to the model."""
    modules = find_targets(model, config.targets, config.exclude, config.layers)
    if allocation is not None and (missing := modules.keys() - allocation.keys()):
        raise UserError(f"The allocation lacks {len(missing)} target layers, for example {sorted(missing)[0]!r}.")
    experts = {n: allocation[n] if allocation is not None else config.num_experts for n in modules}
    kinds = {n: f"{n.rsplit('.', 1)[-1]}-{'x'.join(map(str, widths(m)))}" for n, m in modules.items()}
    most: dict[str, int] = {}
    for n, kind in kinds.items():
        most[kind] = max(most.get(kind, 0), experts[n])

    built: dict[str, tuple[nn.Module, nn.Module]] = {}
    for n, module in modules.items():
        if n in adapter.experts_per_layer:
            raise UserError(f"{n!r} is a target twice; targets of plain LoRA and of the mixture must differ.")
        if experts[n] < 1:
            raise UserError(f"The allocation gives {n!r} {experts[n]} experts; every adapted layer needs at least one.")
        d, o = widths(module)
        frozen = module.weight
        spec = LayerSpec(
            name=n,
            kind=kinds[n],
            index=layer_index(n),
            in_features=d,
            out_features=o,
            num_experts=experts[n],
            kind_experts=most[kinds[n]],
            rank=config.rank_per_expert(),
            device=torch.device(device) if device is not None else frozen.device,  # type: ignore[arg-type]
            dtype=getattr(torch, config.dtype),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((torch.initial_seed() + zlib.crc32(n.encode())) % 2**63)
            layer = AdaptedLinear(spec, config, adapter.bank)
        adapter.experts_per_layer[n] = experts[n]
        _add(adapter.layers, n, layer)
        built[n] = (module, layer)
    return built


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The frozen modules that have an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Adapted)}
