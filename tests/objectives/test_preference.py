"""Preference tuning: the losses by their papers, the reference, and runs from the command line."""

from __future__ import annotations

import json
import math
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from talklora_pl import AdapterConfig, FineTuner, RoutingCollector, balance_loss, inject
from talklora_pl.adapter.io import adapter_tensors, load_adapter
from talklora_pl.balance.switch import Switch
from talklora_pl.base import BaseModel, load_base
from talklora_pl.cli import main
from talklora_pl.errors import UserError
from talklora_pl.inputs import NO_LOSS, labelled
from talklora_pl.objectives.preference import REFERENCE, Preference
from talklora_pl.routers.top_k import TopK
from tests.conftest import tiny_llama
from tests.data.tiny import save_model, tokenizer

PAIRS = {
    "input_ids": [[[5, 6, 7, 8], [5, 6, 9]], [[10, 11, 12], [10, 13, 14, 15, 16]]],
    "labels": [[[NO_LOSS, NO_LOSS, 7, 8], [NO_LOSS, NO_LOSS, 9]], [[NO_LOSS, 11, 12], [NO_LOSS, 13, 14, 15, 16]]],
    "label": [0, 0],
}
OPTIONS = AdapterConfig(expert_rank=2, targets="all-linear", dropout_input=0.3, dtype="float64")


def pairs() -> dict[str, Any]:
    return Preference().collate(PAIRS, 0, True)


def start(model: PreTrainedModel, objective: Preference, config: AdapterConfig = OPTIONS, warm: bool = False) -> None:
    """What FineTuner does; an adapter that was trained before has values everywhere."""
    adapter = inject(model, objective.before_adapter(model, config))
    if warm:
        randomise(adapter)
    objective.after_adapter(model, warm)
    model.train()


def randomise(adapter: torch.nn.Module, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def log_p(model: PreTrainedModel) -> torch.Tensor:
    """Of every answer alone, summed over its tokens, (Q,2)."""
    model.eval()
    out = []
    for ids, labels in zip(chain(*PAIRS["input_ids"]), chain(*PAIRS["labels"])):
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        out.append(sum(logits[i - 1, ids[i]] for i, label in enumerate(labels) if label != NO_LOSS))
    return torch.stack(out).view(-1, 2)


LENGTHS = torch.tensor([[2, 1], [2, 4]])


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_the_first_loss_is_ln_2(base: str, warm: bool) -> None:
    """GPT-2 has dropouts of its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny_llama() if base == "llama" else GPT2LMHeadModel(GPT2Config(**sizes))
    model.double()
    before = {n for n, p in model.named_parameters()}
    start(model, objective := Preference(), warm=warm)
    loss, rows, observed = objective.loss(model, pairs())
    assert rows == 2 and abs(loss.item() / rows - math.log(2)) < 1e-6
    assert observed["rewards/margin"] == 0 and model.training
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and not trained & before and not any(REFERENCE in n for n in trained)


@pytest.mark.parametrize("warm", [False, True])
def test_dpo_is_the_papers_and_its_reference_stays(warm: bool) -> None:
    model = tiny_llama().double()
    start(model, objective := Preference(beta=0.4, label_smoothing=0.2), warm=warm)
    reference_Q2 = log_p(model)
    randomise(model.talklora["default"])
    policy_Q2 = log_p(model.train())
    ratio_Q2 = 0.4 * (policy_Q2 - reference_Q2)
    margin_Q = ratio_Q2[:, 0] - ratio_Q2[:, 1]
    wanted = -0.8 * F.logsigmoid(margin_Q) - 0.2 * F.logsigmoid(-margin_Q)
    loss, _, observed = objective.loss(model.train(), pairs())
    assert margin_Q.abs().min() > 1e-3
    torch.testing.assert_close(loss.double(), wanted.sum(), rtol=1e-5, atol=0)
    for name, value in {"chosen": ratio_Q2[:, 0], "rejected": ratio_Q2[:, 1], "margin": margin_Q}.items():
        torch.testing.assert_close(observed[f"rewards/{name}"].double(), value.sum(), rtol=1e-4, atol=1e-6)
    assert observed["rewards/accuracy"] == (margin_Q > 0).sum()
    loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("talklora.default."))
    assert any(p.grad.abs().max() > 0 for p in model.talklora["default"].parameters() if p.grad is not None)


def test_orpo_and_simpo_are_the_papers() -> None:
    model = tiny_llama().double()
    start(model, Preference(loss_type="simpo"))
    randomise(model.talklora["default"])
    mean_Q2 = log_p(model) / LENGTHS
    (chosen_Q, rejected_Q), p_Q2 = mean_Q2.unbind(1), mean_Q2.exp()
    odds_Q2 = p_Q2 / (1 - p_Q2)
    wanted = {
        "simpo": -F.logsigmoid(2.5 * chosen_Q - 2.5 * rejected_Q - 0.7),
        "orpo": -chosen_Q - 2.5 * F.logsigmoid((odds_Q2[:, 0] / odds_Q2[:, 1]).log()),
    }
    for name, loss_Q in wanted.items():
        objective = Preference(name, beta=2.5, gamma=0.7 if name == "simpo" else None)  # type: ignore[arg-type]
        loss, _, observed = objective.loss(model.train(), pairs())
        torch.testing.assert_close(loss.double(), loss_Q.sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(observed["rewards/chosen"].double(), 2.5 * chosen_Q.sum(), rtol=1e-5, atol=0)
    # a filler has no answer; its loss is multiplied by 0, and must be a number
    filler = Preference().collate({"input_ids": [[[5], [5]]], "labels": [[[NO_LOSS]] * 2], "label": [-1]}, 0, True)
    assert all(Preference(name).loss(model, filler)[0].isfinite() for name in ("dpo", "orpo", "simpo"))


def test_balance_losses_see_the_policy_alone() -> None:
    """The reference's forward is no part of the records; their loss is that of the same batch without it."""
    options = AdapterConfig(
        expert_rank=2, targets=["q_proj", "up_proj"], router=TopK(), balance=[Switch()], dtype="float64"
    )
    model = tiny_llama().double()
    start(model, objective := Preference(), options, warm=True)
    batch = pairs()
    values = []
    for loss in (objective, Preference(loss_type="orpo")):
        with RoutingCollector(model, batch["attention_mask"]) as collector:
            loss.loss(model, batch)
        assert len(collector.records) == 4 and collector.records[0].shape == (4, 5)
        values.append(balance_loss(model, collector.records).detach())
    assert torch.equal(*values) and values[0] > 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"beta": 0.0}, "beta: 0.0 is not above 0"),
        ({"label_smoothing": 0.5}, "not in"),
        ({"label_smoothing": 0.1, "loss_type": "simpo"}, "no effect on simpo"),
        ({"gamma": 1.0}, "no effect on dpo"),
        ({"loss_type": "ipo"}, "none of dpo, orpo, simpo"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Preference(**options)


def test_a_base_that_is_trained_is_no_reference() -> None:
    options = AdapterConfig(expert_rank=2, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"trains lm_head .* orpo or simpo"):
        Preference().before_adapter(tiny_llama(), options)
    assert Preference(loss_type="orpo").before_adapter(tiny_llama(), options).modules_to_save == ["lm_head"]


# --- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, a configuration, and in ``first`` a run of two steps from a fresh adapter."""
    folder = tmp_path_factory.mktemp("preference")
    save_model(folder / "base", initializer_range=0.2)
    rows = [{"prompt": f"{i} and one?", "chosen": str(i + 1), "rejected": "no idea"} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"base": {"path": str(folder / "base"), "dtype": "float32"}},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "val": str(folder / "rows.jsonl"),
            "batch_size": 5,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
        },
        "load_balance": {"figures": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert run("fit", folder, folder / "first", "--config", "method/talklora") == 0
    return folder


def run(verb: str, folder: Path, root: Path, *args: str) -> int:
    method, rest = (args[:2], args[2:]) if args[:2] == ("--config", "method/talklora") else ((), args)
    rest = ("--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(root), *rest)
    rate = ("--model.optimizer.lr", "0.02")
    return main([verb, *method, "--config", "recipe/preference", *rest, *rate])


def state(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_what_a_run_logs_and_leaves(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "first/version_0"))
    events.Reload()
    first = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert first["train_loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margin"] == 0
    assert {f"rewards/{name}" for name in ("chosen", "rejected", "accuracy", "margin")} <= first.keys()
    last = events.Scalars("val_loss")[-1].value
    assert last < math.log(2) and events.Scalars("val_accuracy")[-1].value > 0.5
    # the exported folder is an adapter as any: the validation loss, by hand
    tuned, base = (load_base(BaseModel(str(folder / "base"), dtype="float32")) for _ in range(2))
    load_adapter(tuned, folder / "first/version_0/adapters/last")
    losses = []
    for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
        prompt, ratios = tokenizer()(row["prompt"]).input_ids, []
        for answer in (row["chosen"], row["rejected"]):
            ids = torch.tensor([[*prompt, *tokenizer()(answer, add_special_tokens=False).input_ids, 257]])
            both = [m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]) for m in (tuned, base)]
            ratios.append((both[0] - both[1])[len(prompt) - 1 :].sum())
        losses.append(-F.logsigmoid(0.1 * (ratios[0] - ratios[1])).item())
    assert sum(losses) / len(losses) == pytest.approx(last, rel=1e-5)


@pytest.mark.slow
def test_from_an_adapter_and_resumed_it_keeps_the_reference(folder: Path, tmp_path: Path) -> None:
    """Three steps in one run, or two and one after the folder that it began from was replaced."""
    copy = tmp_path / "adapter"
    shutil.copytree(folder / "first/version_0/adapters/last", copy)
    warm = ("--model.adapter_path", str(copy))
    assert run("fit", folder, tmp_path / "whole", *warm, "--trainer.max_steps", "3") == 0
    assert run("fit", folder, tmp_path / "part", *warm) == 0
    part = tmp_path / "part/version_0"
    whole, first = (state(p / "version_0") for p in (tmp_path / "whole", folder / "first"))
    for name, value in first.items():  # the reference is what the run began from
        assert torch.equal(whole[name.replace(".default.", f".{REFERENCE}.")], value)
    shutil.rmtree(copy)
    shutil.copytree(part / "adapters/last", copy)  # the same method, other tensors
    resume = ("--ckpt_path", str(part / "checkpoints/last.ckpt"))
    assert run("fit", folder, tmp_path / "part", *warm, *resume, "--trainer.max_steps", "3") == 0
    resumed = state(part)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[n], whole[n]) for n in whole)
    # exported without the reference; and the reference is asked for where it belongs
    assert main(["export", str(part), "--out", str(tmp_path / "out")]) == 0
    model = load_base(BaseModel(str(folder / "base"), dtype="float32"))
    load_adapter(model, tmp_path / "out")
    assert not any(REFERENCE in name for name in adapter_tensors(model))
    assert run("validate", folder, tmp_path / "val", "--config", "method/talklora", *resume) == 2


@pytest.mark.slow
def test_predict_answers_the_prompts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "ask.jsonl"
    rows.write_text('{"prompt": "1 and one?"}\n{"prompt": "2?", "chosen": "a", "rejected": "b"}\n')
    monkeypatch.setattr(FineTuner, "_output", lambda self, name: tmp_path / name)
    last = ("--ckpt_path", str(folder / "first/version_0/checkpoints/last.ckpt"))
    more = ("--data.predict", str(rows), "--model.evaluation.max_new_tokens", "3")
    assert run("predict", folder, tmp_path, "--config", "method/talklora", *last, *more) == 0
    answers = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and all("text" in answer for answer in answers)


@pytest.mark.slow
def test_equal_to_trl(tmp_path: Path) -> None:
    """Loss and rewards of TRL's DPOTrainer on the same batch and weights."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    save_model(tmp_path / "base", initializer_range=0.2)
    rows = [{"prompt": f"{i} and one?", "chosen": str(i + 1), "rejected": "no idea"} for i in range(4)]
    policy, reference = (load_base(BaseModel(str(tmp_path / "base"), dtype="float32")) for _ in range(2))
    start(policy, objective := Preference(beta=0.3))
    randomise(policy.talklora["default"], 0.1)
    tok = tokenizer(pad=True)
    args = trl.DPOConfig(
        str(tmp_path / "out"), beta=0.3, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False
    )
    trainer = trl.DPOTrainer(policy, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tok)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(policy.train(), dict(batch))
    theirs.backward()
    grads = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    order = [0, 4, 1, 5, 2, 6, 3, 7]  # theirs are all chosen ones, then all rejected ones
    real = batch["attention_mask"].bool()
    ids = [batch["input_ids"][i][real[i]].tolist() for i in order]
    masks = [batch["completion_mask"][i][real[i]].tolist() for i in order]
    labels = [[t if m else NO_LOSS for t, m in zip(*row)] for row in zip(ids, masks)]
    policy.zero_grad()
    ours, rows_, observed = objective.loss(policy, labelled(ids, labels, 258))
    (ours / rows_).backward()
    assert rows_ == 4 and abs(theirs.item() - math.log(2)) > 1e-3
    torch.testing.assert_close(ours / rows_, theirs, rtol=0, atol=1e-5)
    names = {"chosen": "chosen", "rejected": "rejected", "accuracy": "accuracies", "margin": "margins"}
    for name, other in names.items():
        assert float(observed[f"rewards/{name}"]) / 4 == pytest.approx(logged[f"rewards/{other}"], abs=1e-5)
    for name, p in policy.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, grads[name], rtol=0, atol=1e-5)
