"""From prepared rows to padded tensors.

Shape letters: B rows of the batch, S tokens of the longest of them, Q questions. Rows are padded on the right; the
attention mask alone says what is real.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from talklora_pl.data.sampler import Batch
from talklora_pl.data.tokens import NO_LOSS

if TYPE_CHECKING:
    import datasets


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """``(B, S)`` from ragged rows, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def masked(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask``, both (B, S)."""
    return {"input_ids": pad(rows, pad_id), "attention_mask": pad([[1] * len(row) for row in rows], 0)}


class Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """Index it with a :class:`~talklora_pl.data.sampler.Batch`, get the tensors of that batch.

    Training: `input_ids`, `attention_mask`, `labels` (B, S) (not shifted, -100: no loss), `id`, `task` (lists),
    `step_tokens`, `micro_steps` (see Batch). The rows are questions with their right answers.

    Evaluation: one row per choice of every question; `group` (B,) is its question, `choice` (B,) its number there.
    Per question: `answer` (Q,) the right choice or -1, `prompt_length` (Q,) tokens before the answer, `real` (Q,) false
    for fillers, `index` (Q,) its place in the data, and the lists `id`, `task`, `answers` (texts of the choices).

    Classification (both): `labels` (B,) are classes, -100 where unknown; a group is a row, the classes are its choices.
    `answers` are their names (`classes`), if they have any.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        pad_id: int,
        training: bool,
        classify: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        self.table, self.pad_id, self.training, self.classify = table, pad_id, training, classify
        self.classes = classes or []

    def __getitem__(self, batch: Batch) -> dict[str, Any]:
        rows: dict[str, Any] = self.table[batch.rows]
        answer = torch.tensor(rows["label"])
        names = {"id": rows["id"], "task": rows["task"]}
        per_question = names | {
            "index": torch.tensor(batch.rows),
            "answers": [self.classes] * len(batch.rows) if self.classify else rows["answers"],
            "answer": answer,
            "prompt_length": torch.tensor(rows["prompt_length"]),
            "real": torch.full_like(answer, not batch.filler, dtype=torch.bool),
        }
        step = {"step_tokens": batch.step_tokens, "micro_steps": batch.micro_steps}
        if self.classify:
            ids = [choices[0] for choices in rows["input_ids"]]
            classes = torch.full_like(answer, NO_LOSS) if batch.filler else answer.where(answer >= 0, NO_LOSS)
            return masked(ids, self.pad_id) | {"labels": classes} | (names | step if self.training else per_question)
        if self.training:
            ids = [choices[right] for choices, right in zip(rows["input_ids"], rows["label"])]
            labels = [choices[right] for choices, right in zip(rows["labels"], rows["label"])]
            if batch.filler:
                ids, labels = [row[:1] for row in ids], [[NO_LOSS] for _ in labels]
            return masked(ids, self.pad_id) | {"labels": pad(labels, NO_LOSS)} | names | step
        ids = [choice for choices in rows["input_ids"] for choice in choices]
        labels = [choice for choices in rows["labels"] for choice in choices]
        place = [(q, c) for q, choices in enumerate(rows["input_ids"]) for c in range(len(choices))]
        group, choice = torch.tensor(place).unbind(1)
        expanded = {"labels": pad(labels, NO_LOSS), "group": group, "choice": choice}
        return masked(ids, self.pad_id) | expanded | per_question
