"""Training loops other than FineTuner: what needs the routing says so, once; documented calls do what is missing."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from talklora_pl import AdapterConfig, RoutingCollector, UserError, balance_loss, disable_adapter, inject
from talklora_pl.balance.switch import Switch
from talklora_pl.balance.z_loss import ZLoss
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.experts.lora import LoRA
from talklora_pl.routers.loss_free import LossFree
from talklora_pl.routers.softmax import Softmax
from talklora_pl.routers.top_k import TopK
from tests.conftest import tiny_llama

IDS = torch.arange(12).reshape(2, 6)
PARTS: dict[str, dict[str, Any]] = {
    "loss": {"router": TopK(), "balance": [Switch(), ZLoss()]},
    "router": {"router": LossFree()},
    "block": {"router": LossFree(per="block"), "balance": [Switch()]},
    "neither": {"router": TopK()},
}


def adapted(parts: str, name: str = "default") -> Any:
    model = tiny_llama().train()
    options = {"experts": LoRA(), "communication": NoCommunication(), "expert_rank": 2, **PARTS[parts]}
    inject(model, AdapterConfig(**options), name)
    return model


def said(run: Any) -> list[str]:
    """Our own warnings while `run` runs."""
    with warnings.catch_warnings(record=True) as all_of_them:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in all_of_them if "RoutingCollector" in str(w.message)]


def step(model: Any) -> Any:
    return lambda: model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("loss", "balance loss 'switch' and balance loss 'z_loss'.*balance_loss.model, collector.records, 'default'"),
        ("router", "router 'loss_free'.*count_loads.collector.records.*after_optimizer_step"),
        ("block", "balance loss 'switch' and the balancing of router 'loss_free'.*balance_loss.*after_optimizer_step"),
    ],
)
def test_the_first_step_that_collects_nothing_is_told_what_it_leaves_out(parts: str, words: str) -> None:
    model = adapted(parts)
    assert [bool(re.search(words, text)) for text in said(step(model))] == [True]
    assert said(step(model)) == []  # once
    assert len(said(step(adapted(parts, "other")))) == 1  # of each adapter


def test_what_needs_no_routing_is_told_nothing() -> None:
    assert said(step(adapted("neither"))) == []


@pytest.mark.parametrize("parts", ["loss", "router", "block"])
def test_what_is_no_training_is_told_nothing(parts: str) -> None:
    model = adapted(parts)
    with torch.no_grad():
        assert said(lambda: model(IDS)) == []
    with disable_adapter(model):
        assert said(lambda: model(IDS)) == []
    model.eval()
    assert said(lambda: model(IDS)) == []
    model.talklora.requires_grad_(False)
    assert said(lambda: model.train()(IDS)) == []
    model.talklora.requires_grad_(True)
    assert len(said(step(model))) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", ["loss", "router", "block"])
def test_layers_that_run_again_for_their_gradient_are_told_nothing(parts: str, reentrant: bool) -> None:
    model = adapted(parts)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()

    def run() -> None:
        with RoutingCollector(model):
            loss = model(IDS, labels=IDS).loss
        loss.backward()

    assert said(run) == []


def test_balance_loss_is_the_weighted_sum_with_gradients() -> None:
    model = adapted("loss")
    with RoutingCollector(model) as collector:
        model(IDS)
    adapter = model.talklora["default"]
    value = balance_loss(model, collector.records)
    parts = {name: loss(collector.records) for name, loss in adapter.balance.items()}
    want = sum(options.weight * parts[options.name] for options in adapter.config.balance)
    torch.testing.assert_close(value, want)
    value.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    with pytest.raises(UserError, match="no routing to balance"):
        balance_loss(model, [])
    with pytest.raises(UserError, match="no adapter 'x'"):
        balance_loss(model, collector.records, "x")
    without = adapted("neither")
    assert balance_loss(without, []) == 0


def documented() -> dict[str, Any]:
    """What the example in docs/export.md defines."""
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n((?:(?!```).)*class BalancedTrainer.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    return found


def trained(model: Any, trainer: Any, callbacks: list[Any], accumulate: int, folder: Path) -> Any:
    torch.manual_seed(0)
    rows = [{"input_ids": [i, 2, 3, 4], "labels": [i, 2, 3, 4]} for i in range(8)]
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.01,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks).train()
    return {n: t.clone() for n, t in model.talklora.state_dict().items()}


def randomised(parts: str) -> Any:
    model = adapted(parts)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.talklora.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    for m in model.modules():
        if hasattr(m, "dropout_input"):
            m.dropout_input = 0.0
    return model


def test_the_documented_trainer_balances(tmp_path: Path) -> None:
    ours = documented()
    run = lambda: trained(randomised("loss"), ours["BalancedTrainer"], [], 1, tmp_path)  # noqa: E731
    assert said(run) == []
    one = run()
    plain = trained(randomised("loss"), transformers.Trainer, [], 1, tmp_path)
    assert any(not torch.equal(one[n], plain[n]) for n in one if ".router." in n)


def test_the_documented_trainer_averages_over_micro_steps(tmp_path: Path) -> None:
    """Rows are alike in length and the z-loss is a mean over tokens, so two halves are the whole."""
    ours = documented()
    PARTS["z"] = {"router": Softmax("x"), "balance": [ZLoss(weight=1.0)]}
    one, two = (trained(randomised("z"), ours["BalancedTrainer"], [], a, tmp_path) for a in (1, 2))
    for n in one:
        torch.testing.assert_close(one[n], two[n], rtol=1e-4, atol=1e-6, msg=n)


def test_the_documented_calls_move_the_biases_of_loss_free(tmp_path: Path) -> None:
    ours = documented()
    moved = {}
    for accumulate in (1, 2):
        after = trained(randomised("router"), ours["BalancedTrainer"], [ours["AfterStep"]()], accumulate, tmp_path)
        moved[accumulate] = {n: t for n, t in after.items() if n.endswith("router.bias")}
        assert any(t.abs().max() > 0 for t in moved[accumulate].values())
    for n, t in moved[1].items():
        assert torch.equal(t, moved[2][n])
