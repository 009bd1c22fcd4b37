"""Put an adapter into a frozen model."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from talklora_pl import registry
from talklora_pl.adapter.adapters import AdapterSet, get_adapter
from talklora_pl.adapter.allocation import decide
from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.adapter.dropouts import Dropouts
from talklora_pl.adapter.host import attach, check_attachable, check_no_peft, detach
from talklora_pl.adapter.upcycle import Upcycled
from talklora_pl.balance import Balance, balance_losses
from talklora_pl.base import portable
from talklora_pl.base.weights import ModuleWeights
from talklora_pl.errors import UserError
from talklora_pl.internals.bitsandbytes import stay_differentiable
from talklora_pl.internals.transformers import let_trainer_train
from talklora_pl.names import ADAPTERS, base_parameters, layer_index, leaf, num_layers
from talklora_pl.ranks import sum_over_ranks
from talklora_pl.routers import RouterModule
from talklora_pl.routing import Collectors, RoutingRecord
from talklora_pl.sites.left_out import say_which_experts_are_left_out
from talklora_pl.sites.mixture import BlockMixture, Mixture
from talklora_pl.sites.ready import ReadyLayers
from talklora_pl.sites.targets import is_linear, widths
from talklora_pl.sites.together import Together
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
        collectors: open :class:`~talklora_pl.routing.RoutingCollector` of this adapter, innermost last.
        together: parameter products that equal layers make at once.
        ready: layers that know what they need for the next token.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.experts_per_layer: dict[str, int] = {}
        self.decisions: dict[str, int] = {}
        self.plain_layers: list[str] = []
        self.collectors = Collectors()
        self._loads: dict[str, Tensor] = {}
        self.bank = Bank()
        self.layers = nn.Module()
        self.balance = nn.ModuleDict()
        self.dropouts = Dropouts(self.layers)
        self.together = Together()
        self.ready = ReadyLayers()

    def train(self, mode: bool = True) -> Adapter:
        self.together.forget()
        self.ready.forget()
        return super().train(mode)

    def count_loads(self, records: Iterable[RoutingRecord]) -> None:
        """Add one training micro-step to the loads of routers that balance themselves."""
        for r in records:
            if self._router(r.layer).wants_loads:
                load_E = r.selections().sum(0)
                self._loads[r.layer] = self._loads[r.layer] + load_E if r.layer in self._loads else load_E

    def after_optimizer_step(self) -> None:
        """Hand the loads of the whole global batch to the routers that want them, and start anew."""
        if self._loads:
            for name, load_E in zip(self._loads, sum_over_ranks(*self._loads.values()), strict=True):
                self._router(name).after_optimizer_step(load_E)
            self._loads.clear()

    def wants_loads(self) -> bool:
        """Whether a router balances itself."""
        return any(isinstance(m, RouterModule) and m.wants_loads for m in self.modules())

    def needs_routing(self) -> bool:
        """Whether something is lost in a training loop that collects no routing."""
        return bool(self.config.balance) or self.wants_loads()

    def forget_loads(self) -> None:
        """What was counted since the last optimiser step counts no longer: the step is left out."""
        self._loads.clear()

    def _router(self, layer: str) -> RouterModule:
        mixture = self.layers.get_submodule(layer)
        assert isinstance(mixture, Mixture)
        return mixture.router

    def routed_layers(self) -> dict[str, int]:
        """Number of experts of the layers that have something to decide, by name."""
        return {n: e for n, e in self.decisions.items() if e > 1}

    def balanced_layers(self, loss: Balance) -> dict[str, int]:
        """Number of experts of the layers of the mixture that enter a balance loss, by name."""
        return {n: e for n, e in self.decisions.items() if n not in self.plain_layers and loss.counts(e)}


Layers = dict[str, tuple[nn.Module, Mixture]]
"""Frozen module and its adapter layer, by name."""


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
    let_train(model)
    start = Upcycled.read(config) if config.init_from else None
    if start is not None:
        config = start.config(config)
    adapter, built = build(model, config, allocation, device)
    if start is not None:
        start.load(model, adapter, config)
    return install(model, adapter, built, name)


def let_train(model: nn.Module) -> None:
    """Ready a quantised base for adapters that are trained on it; others need nothing.

    Raises:
        UserError: gradients do not come through its weights any more.
    """
    if repacked := stay_differentiable(model):
        raise UserError(
            f"bitsandbytes has repacked the 4-bit weight of {repacked!r} for the CPU when the model was evaluated, and "
            "no gradient comes through it any more. Load the base anew, and put the adapter in before the model runs "
            "in eval mode."
        )
    let_trainer_train(model)


def check_name(model: nn.Module, name: str) -> None:
    """Raises: UserError if ``model`` cannot have another adapter of this name."""
    adapters = getattr(model, ADAPTERS, None)
    if isinstance(adapters, AdapterSet) and name in adapters:
        raise UserError(f"The model has an adapter {name!r} already; remove it or choose another name.")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"{name!r} cannot be an adapter's name; use letters, digits and underscores.")


def build(
    model: nn.Module,
    config: AdapterConfig,
    allocation: Mapping[str, int] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Adapter, Layers]:
    """The adapter that :func:`inject` installs. The model is not touched.

    Raises:
        UserError: bad options, or targets that match nothing.
    """
    config.validate()
    check_no_peft(model)
    if allocation is None:
        allocation = decide(config, model, ModuleWeights(model))
    adapter = Adapter(config)
    built: Layers = {}
    for part in (config, config.plain_config()):
        if part is not None:
            found = _build_layers(model, part, adapter, allocation if part is config else None, device)
            built.update(found)
            adapter.plain_layers = [] if part is config else list(found)
    say_which_experts_are_left_out(model, built, config.targets, config.exclude, config.layers)
    for also in config.modules_to_save:
        if not selected_parameters([also], model):
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


def install(model: nn.Module, adapter: Adapter, built: Layers, name: str) -> Adapter:
    """Freeze ``model``, register ``adapter`` under ``name`` and turn it on. On any error the model is as it was."""
    adapters = getattr(model, ADAPTERS, None)
    if not isinstance(adapters, AdapterSet):
        adapters = AdapterSet(_place_of_base(model))
    try:
        for module, layer in built.values():
            attach(module, adapters.switch, name, layer)
        if not hasattr(model, ADAPTERS):
            adapters.watch(model)
        model.add_module(ADAPTERS, adapters)
    except BaseException:
        for module, _ in built.values():
            detach(module, name)
        raise
    trained = selected_parameters(adapter.config.modules_to_save, model)
    for n, p in base_parameters(model).items():
        p.requires_grad_(n in trained)
    adapters[name] = adapter
    adapters.switch.active = name
    adapter.collectors.advice = _advice(adapter, name)
    adapter.train(model.training)
    return adapter


def frozen_copy(model: nn.Module, name: str, copy: str) -> Adapter:
    """Give ``model`` a copy of its adapter ``name`` that is never trained, and leave on what is on.

    What ``name`` trains of the base itself is not copied.

    Raises:
        UserError: there is no adapter ``name``, or there is one called ``copy``.
    """
    adapter, adapters = get_adapter(model, name), getattr(model, ADAPTERS)
    check_name(model, copy)
    on, trained = adapters.switch.active, {p for p in model.parameters() if p.requires_grad}
    experts = {n: e for n, e in adapter.experts_per_layer.items() if n not in adapter.plain_layers}
    new, built = build(model, adapter.config, experts, next(adapter.layers.parameters()).device)
    new.load_state_dict(adapter.state_dict())
    install(model, new, built, copy)
    for p in model.parameters():
        p.requires_grad_(p in trained)
    new.eval()
    adapters.switch.active = on
    return new


def _place_of_base(model: nn.Module) -> str:
    """Hub name of a model, or full path of its folder: the working directory may change later."""
    place = getattr(getattr(model, "config", None), "name_or_path", None) or ""
    # a folder that happens to have the hub name, but holds no model, is not where it came from
    return portable(place) if os.path.isfile(os.path.join(place, "config.json")) else place


def _advice(adapter: Adapter, name: str) -> str:
    """What a training loop that collects no routing has to be told; empty if the adapter needs none collected."""
    losses = [f"balance loss {loss.name!r}" for loss in adapter.config.balance]
    loads = adapter.wants_loads()
    if not adapter.needs_routing():
        return ""
    what = losses + [f"the balancing of router {adapter.config.router.name!r}"] * loads
    calls = [f"add talklora_pl.balance_loss(model, collector.records, {name!r}) to the loss"] if losses else []
    if loads:
        calls += [
            f"call model.talklora[{name!r}].count_loads(collector.records)",
            f"after every optimiser step call model.talklora[{name!r}].after_optimizer_step()",
        ]
    return (
        f"This training leaves out {' and '.join(what)}: nothing collects the routing. Run the model inside of "
        f"`with talklora_pl.RoutingCollector(model, attention_mask) as collector:`; {', and '.join(calls)}. For "
        "transformers.Trainer and TRL, talklora_pl.BalanceMixin does it: docs/export.md, 'Training with another loop'."
    )


def balance_loss(model: nn.Module, records: Sequence[RoutingRecord], name: str = "default") -> Tensor:
    """Weighted sum of an adapter's balance losses (scalar), for a training loop other than ``FineTuner``'s.

    Args:
        records: of a :class:`~talklora_pl.routing.RoutingCollector` around one forward pass in training mode.

    Raises:
        UserError: the model has no such adapter, or nothing was collected.
    """
    return balance_losses(get_adapter(model, name), records)[0]


def selected_parameters(modules_to_save: list[str], model: nn.Module) -> set[str]:
    """Names of the base's parameters that ``modules_to_save`` selects."""
    return {n for n in base_parameters(model) if any(f".{m}." in f".{n}" for m in modules_to_save)}


def _build_layers(
    model: nn.Module,
    config: AdapterConfig,
    adapter: Adapter,
    allocation: Mapping[str, int] | None,
    device: torch.device | str | None,
) -> Layers:
    """Adapter layers by module name, registered in ``adapter`` but not yet attached to the model."""
    site = config.experts.site
    modules = site.find(model, config.targets, config.exclude, config.layers, keep=allocation or ())
    specs = _specs(model, modules, config, _experts_of(modules, config, allocation), device)
    blocks: dict[str, BlockMixture] = {}
    built: Layers = {}

    def add(name: str, module: nn.Module, layer: Mixture) -> None:
        if name in built or name in adapter.experts_per_layer:
            raise UserError(f"{name!r} is a target twice; targets of plain LoRA and of the mixture must differ.")
        check_attachable(name, module)
        layer.collectors = adapter.collectors
        adapter.collectors.handed[name] = layer.handed
        _register(adapter.layers, name, layer)
        built[name] = (module, layer)

    for name, spec in specs.items():
        with _seeded_by(name):
            block = None
            if config.router.per == "block" and site.in_blocks:
                path = name.rpartition(".")[0]
                if path not in blocks:
                    blocks[path] = _block(model, path, spec, config)
                    add(path, model.get_submodule(path), blocks[path])  # before its Linears, its children
                block = blocks[path]
                if block.num_experts != spec.num_experts:
                    raise UserError(
                        f"router.per: block: the Linears of {path!r} have unequal numbers of experts in the "
                        "allocation; give all of them the same, or use router.per: linear."
                    )
            layer = site.build(spec, config, adapter.bank, modules[name], block)
            if block is not None and not block.decides and spec.in_features == block.width:
                block.use_features_of(layer.experts, spec, config)
        add(name, modules[name], layer)
        adapter.experts_per_layer[name] = spec.num_experts
        if block is None:
            adapter.decisions[name] = spec.num_experts
    for path, block in blocks.items():
        if not block.decides:
            raise UserError(
                f"router.per: block: no target in {path!r} takes the block's own input (width {block.width}); add one "
                "to targets, or use router.per: linear."
            )
        adapter.decisions[path] = block.num_experts
    return built


def _experts_of(
    modules: Mapping[str, nn.Module], config: AdapterConfig, allocation: Mapping[str, int] | None
) -> dict[str, int]:
    """Number of experts of every module; without an allocation the configured one."""
    if allocation is None:
        return dict.fromkeys(modules, config.num_experts)
    if missing := modules.keys() - allocation.keys():
        raise UserError(f"The allocation lacks {len(missing)} target layers, for example {sorted(missing)[0]!r}.")
    for name in modules:
        if allocation[name] < 1:
            raise UserError(
                f"The allocation gives {name!r} {allocation[name]} experts; every adapted layer needs at least one."
            )
    return {name: allocation[name] for name in modules}


def _specs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    experts: dict[str, int],
    device: torch.device | str | None,
) -> dict[str, LayerSpec]:
    """What the components may know of every module."""
    specs = {}
    most: dict[str, int] = {}
    for name, module in modules.items():
        shape = config.experts.site.widths(module)
        own = next(chain(module.parameters(), module.buffers())).device if device is None else torch.device(device)
        kind = f"{leaf(name)}-{'x'.join(map(str, shape))}"
        most[kind] = max(most.get(kind, 0), experts[name])
        specs[name] = LayerSpec(
            name=name,
            kind=kind,
            index=layer_index(name),
            num_layers=num_layers(model, name),
            in_features=shape[0],
            out_features=shape[-1],
            num_experts=experts[name],
            kind_experts=0,
            rank=config.rank_per_expert(),
            hidden_features=shape[1] if len(shape) == 3 else 0,
            communicates=not config.communication.identity,
            uses_features=config.uses_features(),
            device=own,
            dtype=getattr(torch, config.dtype),
        )
    return {name: replace(spec, kind_experts=most[spec.kind]) for name, spec in specs.items()}


@contextmanager
def _seeded_by(name: str) -> Iterator[None]:
    """Random numbers that depend on the current seed and ``name`` alone."""
    with torch.random.fork_rng(devices=[]):
        # the CPU's generator alone: nothing is drawn on a GPU, whose state would not be put back
        torch.default_generator.manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        yield


def _block(model: nn.Module, path: str, spec: LayerSpec, config: AdapterConfig) -> BlockMixture:
    """The decision that a Linear shares with the others of the module ``path`` that directly contains it."""
    if not path:
        raise UserError(f"router.per: block: {spec.name!r} is in no block; use router.per: linear.")
    first = next(m for m in model.get_submodule(path).children() if is_linear(m))
    return BlockMixture(replace(spec, name=path, in_features=widths(first)[0]), config)


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register ``module`` under the name that its module has in the base, so that tensor names follow from it.

    Empty modules stand for those on the way that are not adapted. A block can come after modules inside of it (those of
    a nested block); then such an empty module is in its place, and its children become the block's.
    """
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if last in root._modules:
        for child, inside in root.get_submodule(last).named_children():
            module.add_module(child, inside)
    root.add_module(last, module)
