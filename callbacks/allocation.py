"""How many experts each layer gets, decided before the adapters are built."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl import registry
from talklora_pl.adapter.allocation import decide, layer_targets
from talklora_pl.adapter.metadata import AdapterMetadata
from talklora_pl.adapter_module import AdapterModule
from talklora_pl.allocation.alpha import Alpha
from talklora_pl.allocation.report import figure, layer_list, markdown, total
from talklora_pl.allocation.rules import UniformAllocation
from talklora_pl.base import load_base
from talklora_pl.base.weights import SafetensorsWeights
from talklora_pl.cache import cache_root
from talklora_pl.errors import UserError
from talklora_pl.monitoring.tensorboard import Board


def refuse_other_allocation(metadata: AdapterMetadata, pl_module: AdapterModule) -> None:
    """Raise a `UserError` if a checkpoint gives other numbers of experts to the layers of this run.

    Args:
        metadata: the checkpoint's.
        pl_module: after its adapter was built.
    """
    rule, configured = metadata.adapter["allocation"], registry.to_dict(pl_module.adapter_config.allocation)
    if rule != configured:
        raise UserError(
            f"model.adapter.allocation: the checkpoint has experts per layer by {rule}, the configuration says "
            f"{configured}. Configure the same; only a new run, without --ckpt_path, may have another."
        )
    counts = pl_module.adapter.experts_per_layer
    for layer, before in metadata.experts_per_layer.items():
        if (now := counts.get(layer, before)) != before:
            raise UserError(
                f"model.adapter.allocation: the checkpoint has {before} experts in {layer}, the same rule now gives it "
                f"{now}: the base is another one, or its spectra were rounded otherwise on another device. For the "
                f"same base copy {cache_root() / 'spectra'} from the machine on which the run began."
            )


class ExpertAllocation(L.Callback):
    """Applies the adapter's allocation rule to the weight files of the base and logs the outcome.

    :class:`~talklora_pl.module.FineTuner` brings it along; list it only to change its options. From the command line a
    run that continues a checkpoint has the numbers of that. In a script the rule decides again, from the spectra that
    the first run left in the cache, and a checkpoint with other numbers is refused. With several processes the first
    decides and the others are told.

    Args:
        cache: remember the spectra on disk, so that the next run on the same base begins at once.
    """

    def __init__(self, cache: bool = True) -> None:
        self.cache = cache
        self.alphas: list[float] | None = None

    def setup(self, trainer: L.Trainer, pl_module: AdapterModule, stage: str) -> None:
        if pl_module.model is not None or pl_module.allocation is not None:
            return
        outcome: Any = None
        if trainer.is_global_zero:
            try:
                outcome = self._decide(pl_module)
            except UserError as e:  # the other processes wait for an answer, so they get this one
                outcome = e
        outcome = trainer.strategy.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        pl_module.allocation = outcome

    def _decide(self, pl_module: AdapterModule) -> dict[str, int] | None:
        """The rule's answer; None for the uniform one, which needs no look at the model."""
        config = pl_module.adapter_config
        config.validate()
        if isinstance(config.allocation, UniformAllocation):
            return None
        model = load_base(pl_module.base, meta=True)
        weights = SafetensorsWeights.of(pl_module.base.path, pl_module.base.revision)
        if not self.cache:
            weights.fingerprint = None
        counts = decide(config, model, weights)
        if isinstance(config.allocation, Alpha):
            layers = layer_targets(model, config.targets, config.exclude, config.layers, config.experts.site)
            self.alphas = config.allocation.layer_alphas(layers, weights)
        return counts

    def on_fit_start(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        config = pl_module.adapter_config
        layers = layer_targets(pl_module.model, config.targets, config.exclude, config.layers, config.experts.site)
        counts = pl_module.adapter.experts_per_layer
        if not trainer.is_global_zero or not layers or len({counts[m] for layer in layers for m in layer.modules}) == 1:
            return
        name = config.allocation.name
        shown = layer_list(layers, counts) or "by module"
        rank_zero_info(f"Experts per layer ({name}, {total(layers, counts):g} in all): {shown}")
        board = Board(trainer)
        board.text("allocation/table", markdown(layers, counts, self.alphas))
        if board.pictures:
            board.figure("allocation/experts", figure(layers, {name: counts}, self.alphas))
