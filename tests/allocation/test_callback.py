"""Allocation inside a run: before the adapters are built, logged, stored, kept on resume, once for all ranks."""

import json
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from talklora_pl import AdapterConfig, FineTuner, TextData, UserError, load_adapter, save_adapter
from talklora_pl.allocation import Allocation, cache, rules
from talklora_pl.allocation.alpha import Alpha
from talklora_pl.base import BaseModel, load_base
from talklora_pl.callbacks import ExpertAllocation
from talklora_pl.distributed.checkpoint import DurableCheckpointIO
from tests.data.tiny import save_model
from tests.distributed.runs import Run


@pytest.fixture
def base(tmp_path, monkeypatch) -> BaseModel:
    monkeypatch.setattr(cache, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} and one is", "completion": f" {i + 1}"} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    return save_model(tmp_path / "model", num_hidden_layers=3, num_key_value_heads=1, hidden_size=32)


def tuner(base: BaseModel, rule: Allocation) -> FineTuner:
    return FineTuner(base, AdapterConfig(targets=["q_proj", "up_proj"], num_experts=3, expert_rank=2, allocation=rule))


def trainer(steps: int = 1, **options) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger("runs", name=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        **options,
    )


def data(base: BaseModel) -> TextData:
    return TextData(train="train.jsonl", val="train.jsonl", batch_size=4, max_length=64, base=base, cache_dir="tokens")


def per_layer(module: FineTuner) -> list[int]:
    return [module.adapter.experts_per_layer[f"model.layers.{i}.mlp.up_proj"] for i in range(3)]


def test_decides_logs_and_stores(base, tmp_path):
    rule = Alpha(budget=12, estimator="median", beta=20.0)
    module = tuner(base, rule)
    run = trainer()
    run.fit(module, data(base))
    counts = per_layer(module)
    assert sum(counts) == 12 and len(set(counts)) > 1
    assert module.adapter.layers.get_submodule("model.layers.0.mlp.up_proj") is not None

    # the same from the live model, without the callback
    alone = tuner(base, rule)
    alone.configure_model()
    assert alone.adapter.experts_per_layer == module.adapter.experts_per_layer

    events = EventAccumulator(run.logger.log_dir)
    events.Reload()
    assert "allocation/experts" in events.Tags()["images"]
    text = events.Tensors("allocation/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| sum | | 12 |" in text
    assert all(f"| {i} | " in text and f" | {n} |" in text for i, n in enumerate(counts))

    save_adapter(module.model, "adapter")
    assert json.loads(Path("adapter/talklora.json").read_text())["adapter"]["allocation"]["name"] == "alpha"
    loaded = load_adapter(load_base(base), "adapter")
    assert loaded.experts_per_layer == module.adapter.experts_per_layer


def test_resume_keeps_the_numbers_without_reading_the_base_again(base, monkeypatch):
    rule = Alpha(budget=12, estimator="median", beta=20.0)
    first, run = tuner(base, rule), trainer()
    run.fit(first, data(base))
    run.save_checkpoint("a.ckpt")
    counts = per_layer(first)
    assert len(set(counts)) > 1
    trained = {k: v.clone() for k, v in first.trained().items()}

    monkeypatch.setattr(cache, "exponents_of", lambda *_: pytest.fail("computed anew"))
    second = tuner(base, rule)
    trainer(2).fit(second, data(base), ckpt_path="a.ckpt")
    assert per_layer(second) == counts
    assert any(not torch.equal(trained[k], v) for k, v in second.trained().items())  # it went on

    third = tuner(base, rule)
    trainer().validate(third, data(base), ckpt_path="a.ckpt")
    assert all(torch.equal(trained[k], v) for k, v in third.trained().items())


@dataclass
class Dice(Allocation):
    """Another outcome every time, as from a base whose weights changed."""

    faces = iter([[1, 4, 2], [1, 3, 3]])

    def allocate(self, layers, num_experts, weights=None):
        return rules.per_layer(layers, next(Dice.faces))


def test_another_outcome_of_the_same_rule_is_refused(base, monkeypatch):
    monkeypatch.setattr(Dice, "name", "dice", raising=False)
    run = trainer()
    run.fit(tuner(base, Dice()), data(base))
    run.save_checkpoint("a.ckpt")
    with pytest.raises(UserError, match=r"checkpoint has 4 experts in .*layers\.1\..*now gives it 3.*copy .*spectra"):
        trainer(2).fit(tuner(base, Dice()), data(base), ckpt_path="a.ckpt")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (rules.Listed([1, 4, 2]), rules.UniformAllocation()),
        (rules.Listed([1, 4, 2]), rules.Listed([1, 1, 5])),
        (rules.UniformAllocation(), rules.Listed([1, 2, 3])),
    ],
)
def test_another_allocation_than_the_checkpoints_is_refused(base, old, new):
    run = trainer()
    run.fit(tuner(base, old), data(base))
    run.save_checkpoint("a.ckpt")
    with pytest.raises(UserError, match=f"checkpoint has experts per layer by .*{old.name}.* says .*{new.name}"):
        trainer(2).fit(tuner(base, new), data(base), ckpt_path="a.ckpt")


def test_one_callback_only(base):
    mine = ExpertAllocation(cache=False)
    run = trainer(callbacks=[mine])
    run.fit(tuner(base, Alpha(estimator="median")), data(base))
    assert [c for c in run.callbacks if isinstance(c, ExpertAllocation)] == [mine]
    assert len(mine.alphas) == 3
    assert not list(Path("cache").rglob("*.json"))


@pytest.mark.parametrize(
    ("rule", "checkpoint", "message"),
    [
        (Alpha(budget=2), None, "budget of 2 experts is too small for 3 layers"),
        (rules.Listed([1, 2]), None, "2 entries, but 3 decoder layers"),
        (rules.UniformAllocation(), "absent.ckpt", "no checkpoint file absent.ckpt"),
        (rules.UniformAllocation(), "train.jsonl", "train.jsonl is torn, damaged or no checkpoint"),
    ],
)
def test_refusals(base, rule, checkpoint, message):
    with pytest.raises(UserError, match=message):
        trainer(plugins=DurableCheckpointIO()).fit(tuner(base, rule), data(base), ckpt_path=checkpoint)


@pytest.mark.slow
def test_two_processes_decide_once(base, tmp_path):
    (tmp_path / "counting.py").write_text(
        """
import os
from dataclasses import dataclass
from pathlib import Path
from talklora_pl.allocation import Allocation, per_layer
from talklora_pl.registry import register

@register("counting")
@dataclass
class Counting(Allocation):
    def allocate(self, layers, num_experts, weights=None):
        Path(__file__).with_name(f"decided-by-{os.getpid()}").touch()
        return per_layer(layers, [os.getpid() % 5 + 1 + i for i in range(len(layers))])
"""
    )
    rows = str(tmp_path / "train.jsonl")
    config = {
        "plugins": [str(tmp_path / "counting.py")],
        "model": {
            "base": {"path": base.path},
            "adapter": {"expert_rank": 2, "targets": ["q_proj", "up_proj"], "allocation": "counting"},
        },
        "data": {"train": rows, "val": rows, "batch_size": 4, "max_length": 64},
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_steps": 2},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    argv = ["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    run = Run.start(tmp_path, argv, ranks=2, XDG_CACHE_HOME=str(tmp_path))
    assert run.wait() == [0, 0], run.log()
    assert len(list(tmp_path.glob("decided-by-*"))) == 1
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    stored = torch.load(checkpoint, weights_only=True)["talklora"]["experts_per_layer"]
    pid = int(next(tmp_path.glob("decided-by-*")).name.rpartition("-")[2])
    assert [stored[f"model.layers.{i}.mlp.up_proj"] for i in range(3)] == [pid % 5 + 1 + i for i in range(3)]
