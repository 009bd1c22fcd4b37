"""Supervised fine-tuning: the tokens of the right answer become likelier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from talklora_pl.evaluation import BatchScores, Generation, score_answers
from talklora_pl.inputs import labelled
from talklora_pl.objectives import Batch, Objective
from talklora_pl.pieces import summed_nll
from talklora_pl.registry import register


@register("sft")
@dataclass
class SFT(Objective):
    """Cross-entropy of the right answers' tokens. Choices are ranked, other answers are generated and compared."""

    packs = True

    def collate(self, rows: Mapping[str, list[Any]], pad_id: int, training: bool) -> dict[str, Tensor]:
        if not training:
            return super().collate(rows, pad_id, training)
        ids, labels = (
            [answers[right] for answers, right in zip(rows[name], rows["label"])] for name in ("input_ids", "labels")
        )
        return labelled(ids, labels, pad_id)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        return summed_nll(model, batch)

    def score(self, model: Any, batch: Batch, generate: Generation | None = None) -> BatchScores:
        return score_answers(model, batch, generate)
