"""What ``transformers.Trainer``, and what derives from it (TRL's trainers), need for balance losses and loads."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from talklora_pl.adapter.inject import Adapter, balance_loss
from talklora_pl.errors import UserError
from talklora_pl.names import ADAPTERS
from talklora_pl.routing import RoutingCollector


class BalanceMixin:
    """Put before a trainer, it adds the balance losses of the adapter that is trained, and lets routers that balance
    themselves do so after every optimiser step::

        class BalancedSFTTrainer(BalanceMixin, SFTTrainer): ...

    The model has its adapter by :func:`talklora_pl.inject`, ``from_pretrained(..., trainable=True)``, or as a
    ``PeftModel``. What a trainer computes without gradients, such as the answers of a reference, is not balanced.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_AfterStep())  # type: ignore[attr-defined]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss, in training with the balance losses of the micro-step.

        Raises:
            UserError: the routing has no gradient, as under reentrant gradient checkpointing.
        """
        trainer: Any = super()
        if not model.training:
            return trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        adapted, mask = self.accelerator.unwrap_model(model), inputs.get("attention_mask")  # type: ignore[attr-defined]
        with RoutingCollector(adapted, mask) as collector:
            out = trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        records = [r for r in collector.records if r.routing.weights_TE.requires_grad]
        name, adapter = _trained(adapted)
        if adapter.needs_routing() and not records:
            raise UserError(
                "The routing of this step has no gradient, so nothing can be balanced. With gradient checkpointing, "
                "give the trainer's arguments gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        adapter.count_loads(records)
        balance = balance_loss(adapted, records, name)
        if num_items_in_batch is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func):  # type: ignore[attr-defined]
            balance = balance / self.current_gradient_accumulation_steps  # type: ignore[attr-defined] # else Trainer does
        return (out[0] + balance, *out[1:]) if return_outputs else out + balance


class _AfterStep(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _trained(model)[1].after_optimizer_step()


def _trained(model: Any) -> tuple[str, Adapter]:
    """The adapter that is on."""
    adapters = getattr(getattr(model, "module", model), ADAPTERS)
    name = adapters.switch.active or next(iter(adapters))
    return name, adapters[name]
