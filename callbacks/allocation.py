"""How many experts each layer gets, decided before the adapters are built."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl import registry
from talklora_pl.adapter.allocation import decide, layer_targets
from talklora_pl.allocation.alpha import Alpha
from talklora_pl.allocation.report import figure, layer_list, markdown, total
from talklora_pl.allocation.rules import UniformAllocation
from talklora_pl.base import load_base
from talklora_pl.base.weights import SafetensorsWeights
from talklora_pl.errors import UserError


def _continued_checkpoint() -> Any:
    """Path of the checkpoint that the run begins from, or None.

    Lightning has chosen it before the first hook (``last``, ``hpc`` and the like included), but ``trainer.ckpt_path``
    says so only after the model is built, which is too late. Until then it is an argument of ``Trainer._run``.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not L.Trainer._run.__code__:
        frame = frame.f_back
    return frame.f_locals["ckpt_path"] if frame is not None else None


class ExpertAllocation(L.Callback):
    """Applies the adapter's allocation rule to the weight files of the base and logs the outcome.

    :class:`~talklora_pl.module.FineTuner` brings it along; list it only to change its options. A run that continues a
    checkpoint takes the numbers from there; another rule in its configuration is refused. With several processes the
    first decides and the others are told.

    Args:
        cache: remember the spectra on disk, so that the next run on the same base begins at once.
    """

    def __init__(self, cache: bool = True) -> None:
        self.cache = cache
        self.alphas: list[float] | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if pl_module.model is not None or pl_module.allocation is not None:
            return
        outcome: Any = None
        if trainer.is_global_zero:
            try:
                outcome = self._stored(trainer) or (None, self._decide(pl_module))
            except UserError as e:  # the other processes wait for an answer, so they get this one
                outcome = e
        outcome = trainer.strategy.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        rule, pl_module.allocation = outcome
        configured = registry.to_dict(pl_module.adapter_config.allocation)
        if rule is not None and rule != configured:
            raise UserError(
                f"model.adapter.allocation: the checkpoint has experts per layer by {rule}, the configuration says "
                f"{configured}. Configure the same; only a new run, without --ckpt_path, may have another."
            )

    def _decide(self, pl_module: Any) -> dict[str, int] | None:
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

    def _stored(self, trainer: L.Trainer) -> tuple[dict[str, Any], dict[str, int]] | None:
        """Rule and experts of every module from the checkpoint that is continued; None if there is none."""
        path = _continued_checkpoint()
        if path is None:
            return None
        try:
            about = trainer.strategy.checkpoint_io.load_checkpoint(path).get("talklora")
        except FileNotFoundError:
            raise UserError(f"--ckpt_path: there is no checkpoint {str(path)!r}.") from None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
            raise UserError(f"--ckpt_path: {path} cannot be read as a checkpoint: {str(e).splitlines()[0]}") from e
        return (about["adapter"]["allocation"], about["experts_per_layer"]) if about else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        config = pl_module.adapter_config
        layers = layer_targets(pl_module.model, config.targets, config.exclude, config.layers, config.experts.site)
        counts = pl_module.adapter.experts_per_layer
        if not trainer.is_global_zero or not layers or len({counts[m] for layer in layers for m in layer.modules}) == 1:
            return
        name = config.allocation.name
        shown = layer_list(layers, counts) or "by module"
        rank_zero_info(f"Experts per layer ({name}, {total(layers, counts):g} in all): {shown}")
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if hasattr(writer, "add_text"):
                writer.add_text("allocation/table", markdown(layers, counts, self.alphas), trainer.global_step)
            if hasattr(writer, "add_figure"):
                writer.add_figure(
                    "allocation/experts", figure(layers, {name: counts}, self.alphas), trainer.global_step
                )
