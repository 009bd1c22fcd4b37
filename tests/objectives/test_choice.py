"""Which objective a run has, and what it makes of its base."""

from __future__ import annotations

import pytest
import torch

from talklora_pl.base import BaseModel
from talklora_pl.errors import UserError
from talklora_pl.inputs import NO_LOSS, labelled, loss_positions, pad, token_logits
from talklora_pl.objectives import choose
from talklora_pl.objectives.classification import Classification
from talklora_pl.objectives.sft import SFT
from tests.conftest import tiny_llama


def test_the_task_picks_the_objective_and_the_objective_the_head() -> None:
    causal, classifier = BaseModel("x"), BaseModel("x", task="sequence_classification", num_labels=2)
    assert choose(causal) == (causal, SFT()) and choose(classifier) == (classifier, Classification())
    base, objective = choose(BaseModel("x", num_labels=2), Classification())
    assert (base, objective) == (classifier, Classification())
    with pytest.raises(UserError, match=r"model.objective: sft needs model.base.task: causal_lm"):
        choose(classifier, SFT())


def test_logits_where_loss_is_are_those_of_the_whole_pass() -> None:
    model = tiny_llama()
    rows, labels = [[5, 6, 7, 8], [9, 10], [11, 12, 13]], [[NO_LOSS, 6, NO_LOSS, 8], [NO_LOSS] * 2, [11, NO_LOSS, 13]]
    batch = labelled(rows, labels, pad_id=0)
    assert batch["loss_index"].tolist() == [0, 2, 9] and batch["loss_index"].dtype == torch.int64
    logits_BSV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for given in (batch, {k: v for k, v in batch.items() if not k.startswith("loss_")}):  # others know labels only
        logits_NV, targets_N, row_N = token_logits(model, given)
        torch.testing.assert_close(logits_NV, logits_BSV.flatten(0, 1)[[0, 2, 9]])
        assert (targets_N.tolist(), row_N.tolist()) == ([6, 8, 13], [0, 0, 2])
    assert not len(loss_positions(pad([[NO_LOSS]], 0))["loss_index"])


def test_padding_on_either_side() -> None:
    assert pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
    assert pad([[1], [2, 3]], 0, left=True).tolist() == [[0, 1], [2, 3]]
