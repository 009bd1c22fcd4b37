"""From prepared rows to padded tensors.

B rows of the batch, Q questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from talklora_pl.data.sampler import Batch
from talklora_pl.inputs import NO_LOSS, packed
from talklora_pl.objectives import Objective

if TYPE_CHECKING:
    import datasets


class Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """Index it with a :class:`~talklora_pl.data.sampler.Batch`, get what the objective makes of its rows, and beside it

    in training: the lists `id` and `task`, `tokens` (how many are no pads), and `step_tokens`, `micro_steps`, `filler`
    (see Batch); the rows are packed if `pack` says so;

    in evaluation, per question: `answer` (Q,) the right choice or -1, `prompt_length` (Q,) tokens before the answer,
    `real` (Q,) false for fillers, `index` (Q,) its place in the data, and the lists `id`, `task`, `answers` (texts of
    the choices, or names of the classes).
    """

    def __init__(
        self,
        table: datasets.Dataset,
        objective: Objective,
        pad_id: int,
        training: bool,
        classes: list[str],
        pack: bool = False,
    ) -> None:
        self.table, self.objective, self.pad_id, self.training = table, objective, pad_id, training
        self.classes, self.pack = classes, pack

    def __getitem__(self, batch: Batch) -> dict[str, Any]:
        rows: dict[str, Any] = self.table[batch.rows]
        names = {"id": rows["id"], "task": rows["task"]}
        if self.training:
            if batch.filler:
                rows |= {
                    "input_ids": [[row[:1] for row in answers] for answers in rows["input_ids"]],
                    "token_type_ids": [row[:1] for row in rows["token_type_ids"]],
                    "labels": [[[NO_LOSS] for _ in answers] for answers in rows["labels"]],
                    "label": [-1] * len(batch.rows),
                }
            step = {"step_tokens": batch.step_tokens, "micro_steps": batch.micro_steps, "filler": batch.filler}
            made: dict[str, Any] = self.objective.collate(rows, self.pad_id, True)
            made = packed(made) if self.pack else made
            return made | names | step | {"tokens": int(made["attention_mask"].sum())}
        answer_Q = torch.tensor(rows["label"])
        per_question = {
            "index": torch.tensor(batch.rows),
            "answers": [answers or self.classes for answers in rows["answers"]],
            "answer": answer_Q,
            "prompt_length": torch.tensor(rows["prompt_length"]),
            "real": torch.full_like(answer_Q, not batch.filler, dtype=torch.bool),
        }
        if batch.filler:
            rows["label"] = [-1] * len(batch.rows)
        return self.objective.collate(rows, self.pad_id, False) | names | per_question
