"""Classification of texts with a new head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talklora_pl.evaluation import BatchScores, Generation
from talklora_pl.inputs import NO_LOSS, masked, model_inputs, pad, summed_cross_entropy
from talklora_pl.objectives import Batch, Objective
from talklora_pl.registry import register


@register("classification")
@dataclass
class Classification(Objective):
    """Cross-entropy of the right classes. The head is new, so it is trained along, and the base has no score."""

    takes = "class"
    rows = "classification"
    task = "sequence_classification"
    loss_per = "row"
    base_has_score = False

    def collate(self, rows: Mapping[str, list[Any]], pad_id: int, training: bool) -> dict[str, Tensor]:
        """``labels`` (B,) are classes, -100 where unknown; ``token_type_ids`` (B,S) where a row has two texts."""
        label_B = torch.tensor(rows["label"])
        batch = masked([ids for (ids,) in rows["input_ids"]], pad_id)
        if any(types := rows.get("token_type_ids", ())):
            types = [row or [0] * len(ids) for row, (ids,) in zip(types, rows["input_ids"])]
            batch["token_type_ids"] = pad(types, 0)
        return batch | {"labels": label_B.where(label_B >= 0, NO_LOSS)}

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        logits_BC = model(**model_inputs(batch)).logits
        return summed_cross_entropy(logits_BC, batch["labels"]), len(batch["labels"])

    def score(self, model: Any, batch: Batch, generate: Generation | None = None) -> BatchScores:
        scores_QC = model(**model_inputs(batch)).logits.float().log_softmax(-1)
        known_Q = batch["labels"] >= 0
        nll_Q = -scores_QC.gather(1, batch["labels"].clamp(min=0)[:, None])[:, 0] * known_Q
        right_Q = scores_QC.argmax(1) == batch["labels"]
        return BatchScores(nll_Q, known_Q.float(), scores_QC, known_Q, torch.zeros_like(known_Q), right_Q)

    def modules_to_save(self, model: Any) -> list[str]:
        """Everything outside of the encoder that has parameters."""
        prefix = model.base_model_prefix
        return [n for n, m in model.named_children() if n != prefix and any(True for _ in m.parameters())]
