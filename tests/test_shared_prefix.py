"""Choices that share their question: the same scores as row by row, and the question computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from talklora_pl.adapter import RoutingCollector
from talklora_pl.evaluation import answer_nll, score_answers
from talklora_pl.inputs import NO_LOSS, labelled
from talklora_pl.shared_prefix import runs_trees, shared_nll, trees_of
from tests.data.tiny import SIZES
from tests.export.models import train
from tests.methods.test_families import DECODERS, build, sized

# two questions with three and two choices, one choice with the beginning of another, one open question
ROWS = [
    ([2, 3, 4, 5], [6, 7, 0]),
    ([2, 3, 4, 5], [6, 8, 9, 0]),
    ([2, 3, 4, 5], [10, 0]),
    ([2, 11, 12], [13, 0]),
    ([2, 11, 12], [13, 14, 0]),
    ([15, 16], [17, 0]),
]
GROUP = torch.tensor([0, 0, 0, 1, 1, 2])


def batch() -> dict[str, Any]:
    ids, labels = zip(*((q + a, [NO_LOSS] * len(q) + a) for q, a in ROWS))
    return labelled(ids, labels, 1) | {
        "group": GROUP,
        "choice": torch.tensor([0, 1, 2, 0, 1, 0]),
        "answer": torch.tensor([1, 0, 0]),
    }


def adapted(kind: str, method: str) -> Any:
    model = build(kind).double()
    for p in model.parameters():  # a fresh model hardly listens to anything before
        torch.nn.init.normal_(p, std=0.3)
    targets = ["mlp"] if method in ("graphlora", "mixlora") else "all-linear"
    train(model, sized(method, targets))
    return model.double().eval()


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_scores_equal_those_of_the_plain_rows(kind: str) -> None:
    model = adapted(kind, "talklora_attention")
    assert runs_trees(model)
    plain, tokens = answer_nll(model, batch())
    shared, same_tokens = answer_nll(model, batch(), share=True)
    torch.testing.assert_close(shared, plain, rtol=1e-10, atol=1e-10)
    assert torch.equal(tokens, same_tokens)


@pytest.mark.parametrize("method", ["talklora", "graphlora", "mixlora", "teamlora"])
@torch.no_grad()
def test_routing_is_collected_as_of_the_plain_rows(method: str) -> None:
    model, b = adapted("llama", method), batch()
    seen = []
    for share in (False, True):
        with RoutingCollector(model, b["attention_mask"]) as collector:
            answer_nll(model, b, share)
        seen.append(collector.records)
    assert len(seen[0]) == len(seen[1]) > 0
    for plain, shared in zip(*seen):
        assert (plain.layer, plain.shape) == (shared.layer, shared.shape)
        assert torch.equal(plain.mask_T, shared.mask_T)
        for a, c in zip(plain.routing, shared.routing):
            if a is not None:
                torch.testing.assert_close(c[plain.mask_T], a[plain.mask_T], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_question_is_computed_once() -> None:
    model, b, sizes = adapted("llama", "talklora"), batch(), []
    runs_trees(model)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: sizes.append(args[0].numel()))
    shared = score_answers(model, b)
    hook.remove()
    trees = trees_of(b, torch.float64)
    assert trees is not None
    # 4 + 3 + 3 + 1 tokens of the largest tree: [6, 7, 0], [8, 9, 0] after that 6, and [10, 0]
    assert sizes == [3 * (4 + 3 + 3 + 2)] == [trees.inputs["input_ids"].numel()]
    del b["group"]
    assert trees_of(b | {"group": torch.arange(6)}, torch.float64) is None  # nothing is shared
    assert shared.scores_QC.shape == (3, 3)


@pytest.mark.parametrize(
    "kind, why, changes",
    [
        ("bloom", "takes no positions", {"n_layer": 2, "n_head": 2}),
        ("mamba", "takes no positions", {"num_hidden_layers": 2}),
        ("falcon", "tree", {**SIZES, "alibi": True, "new_decoder_architecture": False}),
        ("recurrent_gemma", "", {**SIZES, "num_hidden_layers": 3, "lru_width": 16, "num_key_value_heads": 1}),
    ],
)
@torch.no_grad()
def test_models_that_cannot_are_scored_row_by_row(
    kind: str, why: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=32, pad_token_id=1, bos_token_id=0, eos_token_id=0, **{"hidden_size": 16, **changes}
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with caplog.at_level("INFO"):
        plain, _ = answer_nll(model, batch())
        shared, _ = answer_nll(model, batch(), share=True)
    assert torch.equal(plain, shared)
    assert "row by row" in caplog.text + "".join(capsys.readouterr()) and why in caplog.text
    assert not runs_trees(model)


@pytest.mark.parametrize("window, shares", [(12, False), (64, True)])
@torch.no_grad()
def test_rows_beyond_a_sliding_window_are_scored_row_by_row(window: int, shares: bool) -> None:
    config = AutoConfig.for_model(
        "mistral", vocab_size=32, sliding_window=window, **SIZES, num_key_value_heads=1, head_dim=8
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).double().eval()
    question, answers = list(range(2, 16)), ([16, 17, 0], [18, 19, 0])
    labels = [[NO_LOSS] * len(question) + answer for answer in answers]
    b = labelled([question + answer for answer in answers], labels, 1) | {"group": torch.zeros(2, dtype=torch.long)}
    plain, _ = answer_nll(model, b)
    shared, _ = answer_nll(model, b, share=True)
    torch.testing.assert_close(shared, plain, rtol=1e-10, atol=1e-10)
    assert runs_trees(model) and (shared_nll(model, b) is not None) == shares
