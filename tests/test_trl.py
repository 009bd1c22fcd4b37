"""TRL's trainers with adapters of this package: as a PeftModel, and by `inject`."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from talklora_pl import BalanceMixin, RoutingCollector, balance_loss, inject
from talklora_pl.base import BaseModel, load_base
from tests.adapter.test_own_loop import documented, randomised, said, trained
from tests.data.tiny import save_model, tokenizer
from tests.methods.test_configs import config_of
from tests.test_peft import bridge, peft, randomise

PAIRS = [{"prompt": f"{i} and one?", "chosen": str(i + 1), "rejected": "no idea"} for i in range(8)]
TEXTS = [{"prompt": f"{i} and one?", "completion": str(i + 1)} for i in range(8)]


def test_the_mixin_does_what_the_documented_calls_do(tmp_path: Path) -> None:
    class Mixed(BalanceMixin, transformers.Trainer):
        pass

    ours, got = documented(), list[Any]()
    wanted = trained(randomised("block"), ours["BalancedTrainer"], [ours["AfterStep"]()], 2, tmp_path)
    assert said(lambda: got.append(trained(randomised("block"), Mixed, [], 2, tmp_path))) == []
    assert wanted.keys() == got[0].keys() and all(torch.equal(wanted[n], got[0][n]) for n in wanted)


def arguments(config: Any, folder: Path, **changes: Any) -> Any:
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.02, "report_to": []}
    options |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return config(str(folder / "out"), **options | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("trl")
    save_model(folder, initializer_range=0.2)
    return BaseModel(str(folder), dtype="float32")


def peft_model(base: BaseModel, method: str, trained: bool = False) -> Any:
    torch.manual_seed(0)
    options = {"expert_rank": 2, "dropout_input": 0.3 if trained else 0.0}  # which TRL turns off for DPO
    if method == "mola":
        options["balance"] = [{"name": "switch", "weight": 0.5}]
    model = peft.get_peft_model(load_base(base), bridge.TalkLoraConfig(method=method, options=options))
    return randomise(model) if trained else model


@pytest.mark.slow
@pytest.mark.parametrize("method", ["talklora", "mola", "lossfree"])
def test_sft(method: str, base: BaseModel, tmp_path: Path) -> None:
    """Loss falls, balance enters the loss exactly, biases of loss-free routers move, the folder loads."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class Balanced(BalanceMixin, trl.SFTTrainer):
        pass

    data, tok = Dataset.from_list(TEXTS), tokenizer(pad=True)
    model = peft_model(base, method)
    args = arguments(trl.SFTConfig, tmp_path, max_steps=6, per_device_train_batch_size=8)
    trainer = Balanced(model, args, train_dataset=data, processing_class=tok)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    with RoutingCollector(model, batch["attention_mask"]) as collector:
        plain = trl.SFTTrainer.compute_loss(trainer, model, dict(batch))
    balance = balance_loss(model, collector.records)
    assert (balance > 0) == (method == "mola")
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), plain + balance)
    model.talklora["default"].forget_loads()
    assert said(trainer.train) == []
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    biases = [t for n, t in model.named_buffers() if n.endswith("router.bias")]
    assert bool(biases) == (method == "lossfree") and all(t.abs().max() > 0 for t in biases)
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["talklora", "lossfree"])
@pytest.mark.parametrize("was_trained", [False, True])
def test_dpo_begins_at_ln_2(method: str, was_trained: bool, base: BaseModel, tmp_path: Path) -> None:
    """The reference is the model as the run started: the base, or a frozen copy, biases of routers included."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class Balanced(BalanceMixin, trl.DPOTrainer):
        pass

    data, tok = Dataset.from_list(PAIRS), tokenizer(pad=True)
    options: dict[str, Any] = {"processing_class": tok, "train_dataset": data}
    model: Any = peft_model(base, method, was_trained) if was_trained else load_base(base)
    if not was_trained:
        options["peft_config"] = bridge.TalkLoraConfig(
            method=method, options={"expert_rank": 2, "dropout_input": 0.0}, task_type="CAUSAL_LM"
        )
    trainer = Balanced(model, args=arguments(trl.DPOConfig, tmp_path), **options)
    assert trainer.ref_model is None and list(trainer.model.talklora) == ["default", *["ref"] * was_trained]
    before = {n: t.clone() for n, t in trainer.model.state_dict().items() if ".talklora.ref." in n}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in warned if "RoutingCollector" in str(w.message) or "second model" in str(w.message)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] != losses[0]
    after = trainer.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.slow
def test_inject_in_trl_is_told_of_its_reference(base: BaseModel, tmp_path: Path) -> None:
    """TRL then loads a second base: right for a fresh adapter, wrong for one that was trained before."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = load_base(base)
    inject(model, config_of("talklora"))
    args = arguments(trl.DPOConfig, tmp_path, max_steps=1)
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer(pad=True)
    )
    assert trainer.ref_model is not None
    with pytest.warns(UserWarning, match="DPOTrainer compares with a second model in memory"):
        trainer.train()
