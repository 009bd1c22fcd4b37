"""Put an adapter into a frozen model."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from talklora_pl import registry
from talklora_pl.adapter.allocation import decide
from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.adapter.ffn import AdaptedFFN
from talklora_pl.adapter.gated import find_modules, gated_ffn
from talklora_pl.adapter.host import Adapted, AdapterSet, attach, check_attachable
from talklora_pl.adapter.layers import AdaptedLinear
from talklora_pl.adapter.mixture import BlockMixture
from talklora_pl.adapter.targets import is_linear, layer_index, num_layers, widths
from talklora_pl.balance import Balance
from talklora_pl.base.weights import ModuleWeights
from talklora_pl.errors import UserError
from talklora_pl.ranks import sum_over_ranks
from talklora_pl.routing import RoutingRecord
from talklora_pl.spec import Bank, LayerSpec


class Adapter(nn.Module):
    """Everything that is trained: one module per adapted layer, what they share, and the balance losses.

    Tensor names are ``layers.<module name in the base>.<part>.<tensor>``, ``bank.<kind>.<tensor>`` and
    ``balance.<loss>.<tensor>``; they are frozen per format version.

    Attributes:
        config: the options it was built from.
        experts_per_layer: number of experts of every adapted module, by full name.
        decisions: number of experts of every module that has a router, by full name: adapted ones, or blocks of them.
        plain_layers: those of them that have plain LoRA beside the mixture.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.experts_per_layer: dict[str, int] = {}
        self.decisions: dict[str, int] = {}
        self.plain_layers: list[str] = []
        self._loads: dict[str, Any] = {}
        self.bank = Bank()
        self.layers = nn.Module()
        self.balance = nn.ModuleDict()

    def count_loads(self, records: Iterable[RoutingRecord]) -> None:
        """Add one training micro-step to the loads of routers that balance themselves."""
        for r in records:
            if self._router(r.layer).wants_loads:
                self._loads[r.layer] = self._loads.get(r.layer, 0) + r.selections().sum(0)

    def after_optimizer_step(self) -> None:
        """Hand the loads of the whole global batch to the routers that want them, and start anew."""
        if self._loads:
            for name, load_E in zip(self._loads, sum_over_ranks(*self._loads.values()), strict=True):
                self._router(name).after_optimizer_step(load_E)
            self._loads.clear()

    def forget_loads(self) -> None:
        """What was counted since the last optimiser step counts no longer: the step is left out."""
        self._loads.clear()

    def _router(self, layer: str) -> Any:
        return self.layers.get_submodule(layer).router

    def routed_layers(self) -> dict[str, int]:
        """Number of experts of the layers that have something to decide, by name."""
        return {n: e for n, e in self.decisions.items() if e > 1}

    def balanced_layers(self, loss: Balance) -> dict[str, int]:
        """Number of experts of the layers of the mixture that enter a balance loss, by name."""
        return {n: e for n, e in self.decisions.items() if n not in self.plain_layers and loss.counts(e)}


Built = dict[str, tuple[nn.Module, nn.Module]]
"""Frozen module and adapter layer by name."""


def _add(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register ``module`` under a dotted name, with plain containers on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if (container := root._modules.get(leaf)) is not None:
        for child, inside in container.named_children():
            module.add_module(child, inside)
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
    check_name(model, name)
    adapter, built = build(model, config, allocation, device)
    return install(model, adapter, built, name)


def check_name(model: nn.Module, name: str) -> None:
    """Raises: UserError if ``model`` cannot have another adapter of this name."""
    adapters = getattr(model, "talklora", None)
    if isinstance(adapters, AdapterSet) and name in adapters:
        raise UserError(f"The model has an adapter {name!r} already; remove it or choose another name.")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"{name!r} cannot be an adapter's name; use letters, digits and underscores.")


def build(
    model: nn.Module,
    config: AdapterConfig,
    allocation: Mapping[str, int] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Adapter, Built]:
    """The adapter that :func:`inject` installs. The model is not touched.

    Raises:
        UserError: bad options, or targets that match nothing.
    """
    config.validate()
    if allocation is None:
        allocation = decide(config, model, ModuleWeights(model))
    adapter = Adapter(config)
    built: Built = {}
    for part in (config, config.plain_config()):
        if part is not None:
            found = _build(model, part, adapter, allocation if part is config else None, device)
            built.update(found)
            adapter.plain_layers = [] if part is config else list(found)
    for also in config.modules_to_save:
        if not trained_by([also], model):
            children = [n for n, _ in model.named_children()]
            raise UserError(
                f"modules_to_save: this model has no module {also!r}.{registry.did_you_mean(also, children)}"
            )
    for loss in config.balance:
        if not adapter.routed_layers():
            raise UserError(
                f"balance loss {loss.name!r}: with one expert per layer there is nothing to balance; remove it."
            )
        if loss.name in adapter.balance:
            raise UserError(f"balance loss {loss.name!r} is listed twice.")
        adapter.balance[loss.name] = loss.build(adapter.balanced_layers(loss)).to(
            next(adapter.layers.parameters()).device
        )
    return adapter, built


def install(model: nn.Module, adapter: Adapter, built: Built, name: str) -> Adapter:
    """Freeze ``model``, register ``adapter`` under ``name`` and turn it on."""
    along = trained_by(adapter.config.modules_to_save, model)
    for n, p in model.named_parameters():
        if not n.startswith("talklora."):
            p.requires_grad_(n in along)
    adapters = getattr(model, "talklora", None)
    if not isinstance(adapters, AdapterSet):
        adapters = AdapterSet()
        model.add_module("talklora", adapters)
    for module, layer in built.values():
        attach(module, adapters.switch, name, layer)
    adapters[name] = adapter
    adapters.switch.active = name
    adapter.train(model.training)
    return adapter


def trained_by(modules_to_save: list[str], model: nn.Module) -> set[str]:
    """Names of the base's parameters that ``modules_to_save`` selects."""
    names = [n for n, _ in model.named_parameters() if not n.startswith("talklora.")]
    return {n for n in names if any(f".{a}." in f".{n}" for a in modules_to_save)}


def _build(
    model: nn.Module, config: AdapterConfig, adapter: Adapter, allocation: Mapping[str, int] | None, device: Any
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Adapter layers by module name, registered in ``adapter`` but not yet attached to the model."""
    whole = config.experts.site == "ffn"
    modules = find_modules(model, config.targets, config.exclude, config.layers, config.experts.site)
    if allocation is not None and (missing := modules.keys() - allocation.keys()):
        raise UserError(f"The allocation lacks {len(missing)} target layers, for example {sorted(missing)[0]!r}.")
    experts = {n: allocation[n] if allocation is not None else config.num_experts for n in modules}
    specs = {n: _spec(n, model, config, experts[n], device) for n in modules}
    most: dict[str, int] = {}
    for spec in specs.values():
        most[spec.kind] = max(most.get(spec.kind, 0), spec.num_experts)

    built: dict[str, tuple[nn.Module, nn.Module]] = {}

    def add(n: str, module: nn.Module, layer: nn.Module) -> None:
        if n in built or n in adapter.experts_per_layer:
            raise UserError(f"{n!r} is a target twice; targets of plain LoRA and of the mixture must differ.")
        check_attachable(n, module)
        _add(adapter.layers, n, layer)
        built[n] = (module, layer)

    blocks: dict[str, BlockMixture] = {}
    for n, module in modules.items():
        if experts[n] < 1:
            raise UserError(f"The allocation gives {n!r} {experts[n]} experts; every adapted layer needs at least one.")
        spec = replace(specs[n], kind_experts=most[specs[n].kind])
        block = None
        layer: AdaptedLinear | AdaptedFFN
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((torch.initial_seed() + zlib.crc32(n.encode())) % 2**63)
            if whole:
                layer = AdaptedFFN(spec, config, adapter.bank, gated_ffn(module))
            else:
                if config.router.per == "block":
                    path = n.rpartition(".")[0]
                    if path not in blocks:
                        blocks[path] = _block(n, path, model, spec, config)
                        # before its Linears, which become its children
                        add(path, model.get_submodule(path), blocks[path])
                    block = blocks[path]
                    if block.num_experts != spec.num_experts:
                        raise UserError(
                            f"router.per: block: the Linears of {path!r} have unequal numbers of experts in the "
                            "allocation; give all of them the same, or use router.per: linear."
                        )
                layer = AdaptedLinear(spec, config, adapter.bank, block)
                if block is not None and not block.decides and spec.in_features == block.width:
                    block.listen_to(layer.experts, spec, config)
        add(n, module, layer)
        adapter.experts_per_layer[n] = experts[n]
        if block is None:
            adapter.decisions[n] = experts[n]
    for n, block in blocks.items():
        if not block.decides:
            raise UserError(
                f"router.per: block: no target in {n!r} takes the block's own input (width {block.width}); add one to "
                "targets, or use router.per: linear."
            )
        adapter.decisions[n] = block.num_experts
    return built


def _spec(name: str, model: nn.Module, config: AdapterConfig, num_experts: int, device: Any) -> LayerSpec:
    module = model.get_submodule(name)
    if device is None:
        device = next(chain(module.parameters(), module.buffers())).device
    if config.experts.site == "ffn":
        d, hidden = gated_ffn(module).width(module)
        shape: tuple[int, ...] = (d, hidden, d)
    else:
        hidden, shape = 0, widths(module)
    return LayerSpec(
        name=name,
        kind=f"{name.rsplit('.', 1)[-1]}-{'x'.join(map(str, shape))}",
        index=layer_index(name),
        num_layers=num_layers(model, name),
        in_features=shape[0],
        out_features=shape[-1],
        num_experts=num_experts,
        kind_experts=num_experts,
        rank=config.rank_per_expert(),
        hidden_features=hidden,
        communicates=not config.communication.identity,
        uses_features=config.uses_features(),
        device=torch.device(device),
        dtype=getattr(torch, config.dtype),
    )


def _block(name: str, path: str, model: nn.Module, spec: LayerSpec, config: AdapterConfig) -> BlockMixture:
    """The decision that the Linear ``name`` shares with the others of the module that directly contains it."""
    if not path:
        raise UserError(f"router.per: block: {name!r} is in no block; use router.per: linear.")
    first = next(m for m in model.get_submodule(path).children() if is_linear(m))
    return BlockMixture(replace(spec, name=path, in_features=widths(first)[0]), config)


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The frozen modules that have an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Adapted)}
