"""Preference tuning: of two answers to a prompt the chosen one becomes likelier than the rejected one.

Q rows of the data (pairs), B = 2 Q sequences: chosen and rejected of each pair in turn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from talklora_pl.adapter.adapters import active_adapter
from talklora_pl.adapter.inject import frozen_copy
from talklora_pl.errors import UserError
from talklora_pl.evaluation import BatchScores, Generation, answer_nll, score_answers
from talklora_pl.names import ADAPTERS, base_modules
from talklora_pl.objectives import Batch, Objective
from talklora_pl.registry import register
from talklora_pl.routing import RoutingCollector

if TYPE_CHECKING:
    from talklora_pl.adapter import AdapterConfig

REFERENCE = "reference"
"""Name of the frozen copy of an adapter that a run began from."""
BETA = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0}


@register("preference")
@dataclass
class Preference(Objective):
    """The chosen answer becomes likelier than the rejected one, by DPO, ORPO or SimPO.

    DPO (arXiv 2305.18290) compares with a reference: the model as the run started, which is the base for a fresh
    adapter and a frozen copy of the adapter for one that was trained before. ORPO (2403.07691) and SimPO (2405.14734)
    need none.

    Attributes:
        loss_type: the loss, by its paper.
        beta: how sharply answers are told apart; of ORPO the weight of the odds ratio beside the likelihood of the
            chosen answer. None: 0.1; SimPO: 2.
        label_smoothing: share of pairs whose labels are taken to be the wrong way round (DPO).
        gamma: margin that SimPO asks for. None: 1.
    """

    takes = "preference"
    rows = "preference"
    loss_per = "row"
    base_has_score = False  # of DPO, whose rewards are the difference from it

    loss_type: Literal["dpo", "orpo", "simpo"] = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    gamma: float | None = None

    def __post_init__(self) -> None:
        """Raises: UserError for values that no training could use."""
        if self.loss_type not in BETA:
            raise UserError(f"model.objective.loss_type: {self.loss_type!r} is none of {', '.join(BETA)}.")
        if self.beta is not None and not (math.isfinite(self.beta) and self.beta > 0):
            raise UserError(f"model.objective.beta: {self.beta} is not above 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"model.objective.label_smoothing: {self.label_smoothing} is not in [0, 0.5).")
        if self.label_smoothing and self.loss_type != "dpo":
            raise UserError(f"model.objective.label_smoothing: has no effect on {self.loss_type}, only on dpo.")
        if self.gamma is not None and self.loss_type != "simpo":
            raise UserError(f"model.objective.gamma: has no effect on {self.loss_type}, only on simpo.")

    # --- the model as the run starts

    def before_adapter(self, model: Any, config: AdapterConfig) -> AdapterConfig:
        """Without dropout, so that policy and reference differ by what was learned alone."""
        if self.loss_type == "dpo" and config.modules_to_save:
            raise UserError(
                "model.objective: dpo compares with the model as the run started, so the base itself must not be "
                f"trained, and this run trains {', '.join(config.modules_to_save)} of it. Leave that out, or use "
                "loss_type: orpo or simpo."
            )
        if any((config.dropout_input, config.dropout_routing, config.dropout_output)):
            _say_without_dropout()
        for module in base_modules(model):
            for name, value in vars(module).items():
                if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                    setattr(module, name, 0.0)
        return replace(config, compat="none", dropout_input=0.0, dropout_routing=0.0, dropout_output=0.0)

    def after_adapter(self, model: Any, warm_start: bool) -> None:
        if warm_start and self.loss_type == "dpo":
            frozen_copy(model, "default", REFERENCE)

    # --- loss

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        reference_B = self._reference(model, batch)
        loss_Q, rewards_Q2 = self._compare(*answer_nll(model, batch), reference_B)
        chosen_Q, rejected_Q = rewards_Q2.detach().unbind(1)
        observed = {
            "rewards/chosen": chosen_Q.sum(),
            "rewards/rejected": rejected_Q.sum(),
            "rewards/accuracy": (chosen_Q > rejected_Q).float().sum(),
            "rewards/margin": (chosen_Q - rejected_Q).sum(),
        }
        return loss_Q.sum(), len(loss_Q), observed

    def score(self, model: Any, batch: Batch, generate: Generation | None = None) -> BatchScores:
        if "group" in batch and len(batch["group"]) == len(batch["answer"]):  # to predict: prompts alone
            return score_answers(model, batch, generate)
        reference_B = self._reference(model, batch)
        loss_Q, rewards_Q2 = self._compare(*answer_nll(model, batch), reference_B)
        real_Q = batch["real"]
        return BatchScores(
            nll_Q=loss_Q * real_Q,
            tokens_Q=real_Q.float(),
            scores_QC=rewards_Q2,
            ranked_Q=real_Q,
            generated_Q=torch.zeros_like(real_Q),
            right_Q=rewards_Q2[:, 0] > rewards_Q2[:, 1],
        )

    def _compare(self, nll_B: Tensor, tokens_B: Tensor, reference_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss of every pair (Q,), and the rewards of its answers (Q,2): beta times the log-likelihood, under DPO minus
        that of the reference, under the others per token."""
        beta = BETA[self.loss_type] if self.beta is None else self.beta
        if reference_B is not None:
            rewards_Q2 = beta * (reference_B - nll_B).view(-1, 2)
            margin_Q = rewards_Q2[:, 0] - rewards_Q2[:, 1]
            right, wrong = 1 - self.label_smoothing, self.label_smoothing
            return -right * F.logsigmoid(margin_Q) - wrong * F.logsigmoid(-margin_Q), rewards_Q2
        log_p_Q2 = (-nll_B / tokens_B.clamp(min=1)).view(-1, 2)
        rewards_Q2 = beta * log_p_Q2
        if self.loss_type == "simpo":
            margin_Q = rewards_Q2[:, 0] - rewards_Q2[:, 1]
            return -F.logsigmoid(margin_Q - (1.0 if self.gamma is None else self.gamma)), rewards_Q2
        below_Q2 = log_p_Q2.clamp(max=-1e-6)  # odds of a sure answer are infinite
        odds_Q2 = below_Q2 - torch.log(-torch.expm1(below_Q2))
        return -log_p_Q2[:, 0] - beta * F.logsigmoid(odds_Q2[:, 0] - odds_Q2[:, 1]), rewards_Q2

    @torch.no_grad()
    def _reference(self, model: Any, batch: Batch) -> Tensor | None:
        """What :func:`answer_nll` gives for the model as the run started, (B,); None if the loss needs no reference.

        Its routing is collected for nobody: balance losses count the policy's tokens alone.
        """
        if self.loss_type != "dpo":
            return None
        started = REFERENCE if REFERENCE in getattr(model, ADAPTERS) else None
        with RoutingCollector(model), _evaluating(model), active_adapter(model, started):
            return answer_nll(model, batch)[0]


@functools.cache  # once
def _say_without_dropout() -> None:
    rank_zero_info("model.objective: preference trains without dropout: those of model.adapter are taken to be 0.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and afterwards every module in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
