"""Scores equal what Hugging Face's model says of each choice alone; fit, test and predict through the Trainer."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console

from talklora_pl import AdapterConfig, FineTuner, TextData
from talklora_pl.adapter import disable_adapter
from talklora_pl.base import BaseModel, load_base
from talklora_pl.data import Source
from talklora_pl.errors import UserError
from talklora_pl.evaluation import (
    BatchScores,
    Evaluation,
    TaskScores,
    choice_scores,
    exact_match,
    predictions,
    row_nll,
    table,
)
from talklora_pl.pieces import token_nll
from tests.data.tiny import save_model, tokenizer

Jsonl = Callable[..., str]
CHOICES = [{"question": f"q{i}", "choices": ["x", "yy", "zzz"][: 2 + i % 2], "label": i % 2} for i in range(7)]
SUMS = [{"prompt": f"{i}=", "completion": f"{i}"} for i in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    model = save_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)
    model.dtype = "float32"
    return model


@pytest.fixture
def jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jsonl:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(rows: list[dict[str, Any]], name: str) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def tuner(base: BaseModel, **options: Any) -> FineTuner:
    torch.manual_seed(0)
    module = FineTuner(base, AdapterConfig(rank=8, targets="all-linear", dropout_input=0), **options)
    module.configure_model()
    for p in module.parameters():  # B starts at zero: give the adapter something to say
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return module.eval()


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, use_distributed_sampler=False, **quiet | options)


def test_log_likelihoods_by_hand() -> None:
    logits_NV = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [0.0, math.log(3.0)]])
    nll_N = token_nll(logits_NV, torch.tensor([1, 0, 0]))
    nll_B, tokens_B = row_nll(nll_N, torch.tensor([0, 0, 2]), rows=3)
    assert nll_B.tolist() == pytest.approx([math.log(4 / 3) + math.log(2), 0, math.log(4)])
    assert tokens_B.tolist() == [2, 0, 1]
    scores_QC = choice_scores(nll_B, tokens_B, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    assert scores_QC[0, 0] == pytest.approx(-math.log(8 / 3) / 2)
    assert scores_QC[1].tolist() == pytest.approx([-math.log(4), -math.inf])


def test_long_answers_are_not_punished_for_their_length() -> None:
    nll_B, tokens_B = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 4.0])
    assert choice_scores(nll_B, tokens_B, torch.tensor([0, 0]), torch.tensor([0, 1])).argmax(1).tolist() == [1]


@pytest.mark.parametrize(
    "output, answer, pattern, right",
    [
        (" yes\n", "yes", None, True),
        ("yes!", "yes", None, False),
        ("the correct answer is answer2", "answer2", r"answer[1-5]", True),
        ("answer1 or answer2", "answer2", r"answer[1-5]", False),
        ("nothing", "answer2", r"answer[1-5]", False),
    ],
)
def test_exact_match(output: str, answer: str, pattern: str | None, right: bool) -> None:
    assert exact_match(output, answer, pattern) is right


def test_ranking_equals_the_model_asked_about_each_choice_alone(base: BaseModel, jsonl: Jsonl) -> None:
    module = tuner(base)
    data = TextData(test=jsonl(CHOICES, "mc.jsonl"), format="cloze", eval_batch_size=7, max_length=60, base=base)
    data.setup("test")
    tok, right, nll, tokens = tokenizer(), 0, 0.0, 0
    records = {}
    for batch in data.test_dataloader():
        scored = module.score(batch)
        records |= {r["index"]: r for r in predictions(scored, batch)}
        right += int((scored.right_Q & scored.ranked_Q).sum())
        nll, tokens = nll + float(scored.nll_Q.sum()), tokens + float(scored.tokens_Q.sum())
    want_right, want_nll, want_tokens = 0, 0.0, 0
    for i, row in enumerate(CHOICES):
        prompt = tok(f"Question: {row['question']}\nAnswer:").input_ids
        scores = []
        for c, choice in enumerate(row["choices"]):
            answer = [*tok(" " + choice, add_special_tokens=False).input_ids, 257]
            logits_SV = module.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            picked = [float(logits_SV[len(prompt) - 1 + j, token].detach()) for j, token in enumerate(answer)]
            scores.append(sum(picked) / len(answer))
            if c == row["label"]:
                want_nll, want_tokens = want_nll - sum(picked), want_tokens + len(answer)
        assert records[i]["scores"] == pytest.approx(scores, abs=1e-4)
        assert records[i]["choice"] == scores.index(max(scores))
        assert records[i]["answer"] == row["choices"][records[i]["choice"]]
        want_right += records[i]["choice"] == row["label"]
    assert (right, tokens) == (want_right, want_tokens)
    assert nll == pytest.approx(want_nll, rel=1e-5)


def test_generation_equals_the_model_asked_alone(base: BaseModel, jsonl: Jsonl) -> None:
    module = tuner(base, evaluation=Evaluation(max_new_tokens=6))
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (1, 5, 9)]
    data = TextData(predict=jsonl(rows, "p.jsonl"), max_length=60, base=base)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    records = predictions(module.score(batch, generate=True), batch)
    for record in records:
        ids = tokenizer()(rows[record["index"]]["prompt"], return_tensors="pt").input_ids
        for _ in range(6):
            best = module.model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
            if best.item() == 257:
                break
        n = len(tokenizer()(rows[record["index"]]["prompt"]).input_ids)
        logits_SV = module.model(ids).logits[0, n - 1 : -1].detach().log_softmax(-1)
        assert record["scores"] == [pytest.approx(float(logits_SV.gather(1, ids[0, n:, None]).mean()), abs=1e-4)]
        assert record["text"] == tokenizer().decode(ids[0, n:], skip_special_tokens=True)


def test_no_head_is_copied_for_every_row(base: BaseModel) -> None:
    """PyTorch does that for a slice of a prompt where the head has no gradient; it took most of the time."""
    module, seen = tuner(base), []
    module.model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: seen.append((args[0].shape[:2], args[0].is_contiguous()))
    )
    module.generation(2)([torch.arange(3), torch.arange(6)])
    assert seen[:2] == [((2, 1), True)] * 2


def scored(right: list[bool], nll: list[float], ranked: bool = True) -> BatchScores:
    judged = torch.tensor([True] * len(right))
    no = ~judged
    return BatchScores(
        torch.tensor(nll),
        torch.ones(len(nll)),
        torch.zeros(len(nll), 2),
        judged if ranked else no,
        no if ranked else judged,
        torch.tensor(right),
    )


def test_scores_per_task_and_mean() -> None:
    scores = TaskScores(["a", "b", "c"])
    scores.update(scored([True, False, True], [1.0, 2.0, 3.0]), ["a", "a", "b"])
    scores.update(scored([False, False], [1.0, 1.0]), ["a", "a"])
    got = scores.compute()
    assert isinstance(got["a"]["questions"], int)
    assert got["a"] == {"accuracy": 0.25, "loss": 1.25, "questions": 4}
    assert got["b"] == {"accuracy": 1.0, "loss": 3.0, "questions": 1}
    assert "c" not in got
    assert got["mean"] == {"accuracy": 0.625, "loss": 1.6}


def test_the_table_fits_a_narrow_window() -> None:
    scores = {"task": {"exact_match": 0.5, "questions": 1000}, "mean": {"exact_match": 0.5}}
    many = {"translation" + "n" * 40: scores["task"], "translation": scores["task"], "mean": scores["mean"]}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(many, many))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert all(word in text for word in ("translation ", "base model", "adapter", "exact match")) and "…" not in text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"answer_pattern": "(["}, r"answer_pattern: '\(\[' is no regular expression"),
        ({"num_beams": 0}, "num_beams: 0 is less than 1"),
        ({"max_new_tokens": -5}, "max_new_tokens: -5 is less than 0"),
    ],
)
def test_options_that_no_test_could_use(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Evaluation(**options)


def test_fillers_and_unknown_answers_do_not_count(base: BaseModel, jsonl: Jsonl) -> None:
    module = tuner(base)
    data = TextData(test=jsonl(CHOICES[:1], "mc.jsonl"), format="cloze", max_length=60, base=base)
    data.setup("test")
    (batch,) = data.test_dataloader()
    for change in ({"real": torch.tensor([False])}, {"answer": torch.tensor([-1])}):
        scores = TaskScores(["mc"])
        scores.update(module.score(batch | change), batch["task"])
        assert not scores.totals.any()


def test_fit_test_predict(base: BaseModel, jsonl: Jsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [Source(jsonl(CHOICES, "quiz.jsonl"), format="cloze"), Source(jsonl(SUMS, "sums.jsonl"), rows="completion")]
    data = TextData(both, val=both, test=both, batch_size=6, eval_batch_size=5, max_length=60)
    module = FineTuner(
        base,
        AdapterConfig(rank=8, targets="all-linear", dropout_input=0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.05),
        evaluation=Evaluation(max_new_tokens=4),
    )
    L.seed_everything(0, verbose=False)
    fit = trainer(tmp_path, max_epochs=8, enable_checkpointing=False)
    before = fit.validate(module, data, verbose=False)[0]
    fit.fit(module, data)
    after = {k: float(v) for k, v in fit.callback_metrics.items()}
    assert after["val_loss"] < 0.8 * before["val_loss"]
    assert {"val_loss", "val_accuracy", "val_loss/quiz", "val_accuracy/quiz", "val_loss/sums"} <= before.keys()
    assert "val_accuracy/sums" not in before

    (logged,) = fit.test(module, data, verbose=False)
    report = json.loads((tmp_path / "test_scores.json").read_text())
    assert report["adapter"]["quiz"]["accuracy"] == pytest.approx(logged["test_accuracy/quiz"])
    assert report["adapter"]["mean"]["loss"] == pytest.approx(after["val_loss"], rel=1e-5)
    assert report["base"]["mean"]["loss"] == pytest.approx(before["val_loss"], rel=1e-5)
    assert report["adapter"]["sums"]["questions"] == 12 and "exact_match" in report["base"]["sums"]
    printed = capsys.readouterr().out
    assert "base model" in printed and "quiz" in printed and "test_scores.json" in printed

    fit.predict(module, data)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"quiz-{i}" for i in range(7)] + [f"sums-{i}" for i in range(12)]
    right = sum(line["text"].strip() == row["completion"] for line, row in zip(lines[7:], SUMS))
    assert right / 12 == pytest.approx(report["adapter"]["sums"]["exact_match"])
    with disable_adapter(module.model):
        ids = torch.tensor([[256, 65, 66]])
        torch.testing.assert_close(module.model(ids).logits, load_base(base)(ids).logits)


def test_classification(base: BaseModel, jsonl: Jsonl, tmp_path: Path) -> None:
    classifier = BaseModel(base.path, task="sequence_classification", num_labels=2, dtype="float32")
    rows = [{"text": f"{'ab'[i % 2]}{i}", "label": i % 2} for i in range(24)]
    data = TextData(jsonl(rows, "train.jsonl"), test=jsonl(rows, "test.jsonl"), val_size=4, batch_size=5, max_length=20)
    module = FineTuner(
        classifier,
        AdapterConfig(rank=8, targets="all-linear", dropout_input=0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.02),
    )
    L.seed_everything(0, verbose=False)
    fit = trainer(tmp_path, max_epochs=8, enable_checkpointing=False)
    fit.fit(module, data)
    (logged,) = fit.test(module, data, verbose=False)
    assert logged["test_accuracy"] > 0.8
    data.labels = ["even", "odd"]
    fit.predict(module, data)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert all(line["answer"] == data.labels[line["choice"]] and len(line["scores"]) == 2 for line in lines)
    assert sum(line["choice"] == row["label"] for line, row in zip(lines, rows)) / 24 == pytest.approx(
        logged["test_accuracy"]
    )
