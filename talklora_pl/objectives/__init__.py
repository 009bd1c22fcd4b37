"""Objectives: what is learned from the data, and how it is scored.

An objective says which rows it takes, how they become a batch, what the loss of a batch is, and how an evaluation batch
is scored. One new file in this folder with one registered class is one new objective.

B rows of the batch, Q questions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from talklora_pl import registry
from talklora_pl.base import BaseModel
from talklora_pl.errors import UserError
from talklora_pl.evaluation import BatchScores, Generation
from talklora_pl.inputs import labelled

if TYPE_CHECKING:
    from talklora_pl.adapter import AdapterConfig

Batch = Mapping[str, Any]


class Objective(registry.Component):
    """Family base. A child is a dataclass whose fields are the user's options.

    Attributes:
        takes: what the examples of its rows are, see :class:`~talklora_pl.data.rows.RowKind`.
        rows: registered kind of rows where nobody says.
        task: the head that the base gets, a key of :data:`~talklora_pl.base.heads.HEADS`: decides which class of
            transformers loads it.
        loss_per: what the loss is averaged over: labelled tokens (of the right answer), or rows of the data.
        base_has_score: whether the base without an adapter is worth comparing with.
        packs: whether the rows of a training batch of :meth:`collate` may be packed
            (:func:`~talklora_pl.inputs.packed`): each stands for itself, and :meth:`loss` asks ``token_logits``. A
            step may then be recorded too (:mod:`talklora_pl.captured`), for which :meth:`loss` looks at tensors alone.
    """

    family = "objective"
    takes: ClassVar[str] = "answers"
    rows: ClassVar[str] = "completion"
    task: ClassVar[Literal["causal_lm", "sequence_classification"]] = "causal_lm"
    loss_per: ClassVar[Literal["token", "row"]] = "token"
    base_has_score: ClassVar[bool] = True
    packs: ClassVar[bool] = False

    def collate(self, rows: Mapping[str, list[Any]], pad_id: int, training: bool) -> dict[str, Tensor]:
        """The tensors of a batch; every model input that it has (``input_ids`` and ``attention_mask`` at least).

        As it stands: one row per answer of every question, with ``group`` (B,) its question and ``choice`` (B,) its
        number there, and the ``labels`` and the index of :func:`~talklora_pl.inputs.labelled`.

        Args:
            rows: columns of the prepared rows (Q entries each): ``input_ids`` and ``labels`` (a list of token ids per
                answer), ``label`` (the right answer or the class, -1: unknown) and those of
                :class:`~talklora_pl.data.prepare.Prepared`. A filler, which only keeps a process in step with the
                others, has one token per sequence, no labels with loss and -1.
            pad_id: fills short rows.
            training: for :meth:`loss`, else for :meth:`score`.
        """
        place = [(q, c) for q, answers in enumerate(rows["input_ids"]) for c in range(len(answers))]
        group_B, choice_B = torch.tensor(place).unbind(1)
        ids, labels = ([row for answers in rows[name] for row in answers] for name in ("input_ids", "labels"))
        return labelled(ids, labels, pad_id) | {"group": group_B, "choice": choice_B}

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, int] | tuple[Tensor, int, dict[str, Tensor]]:
        """Sum of the loss over what carries it, and how much that is (see ``loss_per``): (scalar, tokens or rows).

        The sum over all batches of an optimiser step is divided by all that carries loss in it. A third item, by name,
        is what else is logged: sums over the same, without a gradient.
        """

    @abstractmethod
    def score(self, model: Any, batch: Batch, generate: Generation | None = None) -> BatchScores:
        """Score an evaluation batch: one of :meth:`collate` with ``answer``, ``real`` and the others that
        :class:`~talklora_pl.data.batches.Batches` describes.

        Args:
            model: as it is now, adapter on or off.
            batch: on the model's device.
            generate: to answer what is open with; None: nothing is generated.
        """

    def before_adapter(self, model: Any, config: AdapterConfig) -> AdapterConfig:
        """What the adapter is built with, if the objective needs it otherwise; it may also prepare the base.

        Args:
            model: the base, on the meta device too.
            config: as the user asked for it, with ``modules_to_save``.

        Raises:
            UserError: the objective cannot train such an adapter.
        """
        return config

    def after_adapter(self, model: Any, warm_start: bool) -> None:
        """The model as the run starts.

        Args:
            model: with its adapter on.
            warm_start: the adapter was trained before, or begins as adapters that were; else it is fresh, and the model
                computes what the base does.
        """

    def modules_to_save(self, model: Any) -> Sequence[str]:
        """Modules of the base that are trained along with the adapter."""
        return ()


def choose(base: BaseModel, objective: Objective | None = None) -> tuple[BaseModel, Objective]:
    """The base with the head that its objective needs, and the objective: by default that of ``base.task``.

    Raises:
        UserError: another head was asked for.
    """
    if objective is None:
        return base, registry.get(Objective, base.head.objective)()  # type: ignore[return-value]
    if base.task not in (BaseModel.task, objective.task):
        raise UserError(
            f"model.objective: {objective.name} needs model.base.task: {objective.task}, which is {base.task}."
        )
    return replace(base, task=objective.task), objective


registry.import_siblings(__name__)
