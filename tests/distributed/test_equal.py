"""N processes give the weights of one process with the same global batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from talklora_pl.adapter import AdapterConfig
from talklora_pl.base import BaseModel
from talklora_pl.module import FineTuner
from tests.distributed.runs import curves, distance, fit, load, newest

TWO = ("--data.batch_size", "2")


def same_curve(one: Path, other: Path) -> bool:
    a, b = (curves(folder)["train_loss"] for folder in (one, other))
    return len(a) == len(b) > 0 and np.allclose(a, b, rtol=1e-6, atol=0)  # event files hold float32


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(config: Path, reference: Path, tmp_path: Path, strategy: str) -> None:
    last = fit(config, tmp_path, "--trainer.strategy", strategy, *TWO, ranks=2)
    assert distance(last, reference) < 1e-11
    assert same_curve(tmp_path, reference.parents[1])


SWITCH = {"class_path": "switch", "init_args": {"weight": 0.5, "scope": "model"}}
VARIANTS = {
    "checkpointing": ["--model.gradient_checkpointing", "true", "--trainer.gradient_clip_val", "0.5"],
    # whole feed-forward experts that run for the tokens that chose them, and more of them than tokens can choose
    "unchosen experts": ["--config", "method/mixlora", "--model.adapter.num_experts", "64"],
    "balanced": ["--config", "method/lossfree", "--model.adapter.balance", json.dumps([SWITCH, "z_loss"])],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_one(config: Path, tmp_path: Path, variant: str) -> None:
    options = [*VARIANTS[variant], "--model.adapter.dtype", "float64"]
    one = fit(config, tmp_path / "one", *options)
    if variant == "unchosen experts":
        assert all(share > 0.1 for _, share in curves(tmp_path / "one")["load/dead_experts"])
    if variant == "balanced":
        biases = [v for k, v in load(one)["state_dict"].items() if k.endswith("router.bias")]
        assert biases and all(b.count_nonzero() > 0 for b in biases)
    for strategy in ("ddp", "fsdp"):
        two = fit(config, tmp_path / strategy, "--trainer.strategy", strategy, *TWO, *options, ranks=2)
        assert distance(two, one) < 1e-11, strategy
        assert same_curve(tmp_path / strategy, tmp_path / "one")


@pytest.mark.slow
def test_accumulation_equals_one(config: Path, reference: Path, tmp_path: Path) -> None:
    """4 rows a step, 2 in the epoch's last: one process, one that accumulates, two that accumulate."""
    twice = ("--trainer.accumulate_grad_batches", "2")
    assert distance(fit(config, tmp_path / "one", *TWO, *twice), reference) < 1e-11
    assert same_curve(tmp_path / "one", reference.parents[1])
    for strategy in ("ddp", "fsdp"):
        options = ("--trainer.strategy", strategy, "--data.batch_size", "1", *twice)
        assert distance(fit(config, tmp_path / strategy, *options, ranks=2), reference) < 1e-11, strategy
        assert same_curve(tmp_path / strategy, reference.parents[1])


@pytest.mark.slow
def test_bf16_base_with_fp32_adapters(config: Path, tmp_path: Path) -> None:
    options = ("--model.base.dtype", "bfloat16", "--model.adapter.dtype", "float32")
    one = fit(config, tmp_path / "one", *options)
    two = fit(config, tmp_path / "two", "--trainer.strategy", "fsdp", *TWO, *options, ranks=2)
    assert all(t.dtype == torch.float32 for t in load(two)["state_dict"].values())
    assert distance(two, one) < 0.05  # 8 steps of Adam at rate 0.01 move a weight by at most 0.08


@pytest.mark.slow
@pytest.mark.parametrize("option", ["cpu_offload=true", "meta_init=false"])
def test_fsdp_options_equal_one(config: Path, reference: Path, tmp_path: Path, option: str) -> None:
    name = "talklora_pl.distributed.fsdp.AdapterFSDP2Strategy"
    options = ("--trainer.strategy.class_path", name, f"--trainer.strategy.{option}")
    assert distance(fit(config, tmp_path, *options, *TWO, ranks=2), reference) < 1e-11


@pytest.mark.slow
def test_same_seed_same_bits_twice(config: Path, tmp_path: Path) -> None:
    """Dropout, shuffling, two processes: two runs are equal in every bit and logged number; another seed is not."""
    for name, ranks, options in (("one", 1, ()), ("two", 2, ("--trainer.strategy", "ddp", *TWO))):
        a, b = tmp_path / name / "a", tmp_path / name / "b"
        dropout = (*options, "--model.adapter.dropout_input", "0.1")
        assert distance(fit(config, a, *dropout, ranks=ranks), fit(config, b, *dropout, ranks=ranks)) == 0
        assert curves(a) == curves(b)
    assert distance(fit(config, tmp_path / "c", *dropout[-2:], "--seed_everything", "8"), newest(tmp_path / "one")) > 0


def test_gradient_checkpointing_is_not_reentrant(config: Path) -> None:
    tuner = FineTuner(
        BaseModel(str(config.parent / "model")), AdapterConfig(expert_rank=2), gradient_checkpointing=True
    )
    tuner.configure_model()
    found = [m._gradient_checkpointing_func for m in tuner.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert found and all(f.keywords["use_reentrant"] is False for f in found)
