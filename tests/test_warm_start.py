"""A new run from an adapter that was trained before: ours, a checkpoint's, PEFT's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from talklora_pl import FineTuner
from talklora_pl.adapter.io import adapter_tensors
from talklora_pl.base import BaseModel
from talklora_pl.cli import main
from talklora_pl.errors import UserError
from tests.data.tiny import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two sets of rows, and a run of three steps in ``first``."""
    folder = tmp_path_factory.mktemp("warm")
    torch.manual_seed(0)
    save_model(folder / "base")
    for name, start in (("rows", 0), ("other", 7)):
        rows = [{"prompt": f"{i} and one?", "completion": str(i + 1)} for i in range(start, start + 12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = {
        "model": {"base": {"path": str(folder / "base"), "dtype": "float32"}},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "val_size": 2,
            "batch_size": 2,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
        "load_balance": {"figures": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert fit(folder, folder / "first", "--config", "method/talklora", *LEARN) == 0
    return folder


LEARN = ("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01")


def fit(folder: Path, root: Path, *args: str) -> int:
    return main(["fit", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(root), *args])


def checkpoint(root: Path) -> dict[str, Any]:
    return torch.load(root / "version_0/checkpoints/last.ckpt", weights_only=True)


def files(root: Path) -> dict[str, str]:
    """Digest of every file but TensorBoard's."""
    found = (p for p in root.rglob("*") if p.is_file() and "tfevents" not in p.name)
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.mark.parametrize("source", ["version_0/adapters/last", "version_0/checkpoints/last.ckpt"])
@pytest.mark.parametrize("method", [(), ("--config", "method/talklora")])
def test_begins_with_the_tensors_and_counts_from_nought(
    folder: Path, tmp_path: Path, source: str, method: tuple[str, ...]
) -> None:
    """A learning rate of 0 leaves what was loaded; a new optimiser is at its first step."""
    start = ("--model.adapter_path", str(folder / "first" / source), "--data.train", str(folder / "other.jsonl"))
    frozen = ("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.0", "--trainer.max_steps", "1")
    assert fit(folder, tmp_path, *method, *start, *frozen) == 0
    before, after = checkpoint(folder / "first"), checkpoint(tmp_path)
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert all(torch.equal(before["state_dict"][k], v) for k, v in after["state_dict"].items())
    assert after["global_step"] == 1
    assert {float(s["step"]) for s in after["optimizer_states"][0]["state"].values()} == {1.0}
    assert after["talklora"]["adapter"] == before["talklora"]["adapter"]


def test_a_run_that_began_from_an_adapter_is_resumed_as_any_other(folder: Path, tmp_path: Path) -> None:
    start = ("--model.adapter_path", str(folder / "first/version_0/adapters/last"), *LEARN)
    assert fit(folder, tmp_path / "whole", *start, "--trainer.max_steps", "4") == 0
    assert fit(folder, tmp_path / "cut", *start, "--trainer.max_steps", "2") == 0
    assert fit(folder, tmp_path / "cut", *start, "--trainer.max_steps", "4", "--ckpt_path", "last") == 0
    whole, cut = (checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    again = tmp_path / "whole/version_0/config.yaml"  # all that it took from the adapter stands there
    assert main(["fit", "--config", str(again), "--trainer.default_root_dir", str(tmp_path / "again")]) == 0
    repeated = checkpoint(tmp_path / "again")["state_dict"]
    assert all(torch.equal(whole[k], repeated[k]) for k in whole)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--model.adapter.rank", "64"), "rank of one expert: 8 in the adapter, 16 in this run"),
        (("--model.adapter.targets", "[q_proj]"), "modules only in the adapter"),
        (("--model.adapter.router.temperature", "2.0"), None),
        (("--config", "method/hydralora"), "model.adapter.communication.name: 'talking' in the adapter, 'none' in"),
    ],
)
def test_other_options_are_listed_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: Any, given: tuple[str, ...], named: str | None
) -> None:
    before = files(folder / "first")
    start = ("--model.adapter_path", str(folder / "first/version_0/adapters/last"))
    assert fit(folder, tmp_path / "runs", *start, *given) == 2
    said = capsys.readouterr().err
    assert named is None or named in said, said
    assert "Traceback" not in said
    assert not files(tmp_path) and files(folder / "first") == before


def test_another_base_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    save_model(tmp_path / "base", initializer_range=0.05)
    start = ("--model.adapter_path", str(folder / "first/version_0/adapters/last"))
    assert fit(folder, tmp_path / "runs", *start, "--model.base.path", str(tmp_path / "base")) == 2
    assert "was trained on other weights" in capsys.readouterr().err
    assert not any(path.endswith((".ckpt", ".safetensors", "config.yaml")) for path in files(tmp_path / "runs"))


def test_an_adapter_is_no_checkpoint(folder: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = str(folder / "first/version_0/adapters/last")
    assert fit(folder, tmp_path, "--config", "method/talklora", "--ckpt_path", adapter) == 2
    assert f"--model.adapter_path {adapter}" in capsys.readouterr().err
    assert fit(folder, tmp_path, "--model.adapter_path", str(folder / "first")) == 2
    assert f"Do you mean {folder / 'first/version_0/adapters'}" in capsys.readouterr().err


@pytest.mark.parametrize("change", [("--data.train", "OTHER"), ("--data.max_length", "6"), ("--data.val_size", "3")])
def test_a_checkpoint_of_other_rows_is_refused(
    folder: Path, tmp_path: Path, capsys: Any, change: tuple[str, str]
) -> None:
    change = (change[0], change[1].replace("OTHER", str(folder / "other.jsonl")))
    before = files(folder / "first")
    last = str(folder / "first/version_0/checkpoints/last.ckpt")
    argv = ("--config", "method/talklora", *LEARN, "--ckpt_path", last, "--trainer.max_steps", "5")
    assert fit(folder, folder / "first", *argv, *change) == 2
    said = capsys.readouterr().err
    assert "on other data" in said and f"--model.adapter_path {last}" in said, said
    assert files(folder / "first") == before


def test_rows_that_moved_are_the_same_rows(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.jsonl").write_text((folder / "rows.jsonl").read_text())
    last = str(folder / "first/version_0/checkpoints/last.ckpt")
    argv = ("--config", "method/talklora", *LEARN, "--ckpt_path", last, "--trainer.max_steps", "4")
    # the name of the task, which a row without one has from its file, is none of the model's business
    assert fit(folder, tmp_path / "runs", *argv, "--data.train", str(tmp_path / "elsewhere.jsonl")) == 0
    assert checkpoint(tmp_path / "runs")["global_step"] == 4


def test_a_fit_that_is_over_says_so_and_writes_nothing(folder: Path, caplog: Any) -> None:
    before = files(folder / "first")
    argv = ("--config", "method/talklora", *LEARN, "--ckpt_path", "last")
    with caplog.at_level("INFO"):
        assert fit(folder, folder / "first", *argv) == 0
    said = [r.getMessage() for r in caplog.records if "Nothing is left to do" in r.getMessage()]
    assert len(said) == 1 and "at step 3, with trainer.max_steps 3" in said[0]
    assert files(folder / "first") == before


# --- PEFT


def peft_folder(base: Path, folder: Path, **options: Any) -> Any:
    """A LoRA folder of PEFT with random tensors, and the model that has it."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager"),
        peft.LoraConfig(task_type="CAUSAL_LM", **options),
    )
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": r".*layers\.0\..*(q_proj|up_proj)"}, {"lora_dropout": 0.3}, {"use_rslora": True}],
)
def test_peft_lora_computes_the_same(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = peft_folder(folder / "base", tmp_path / "peft", **options)
    tuner = FineTuner(BaseModel(str(folder / "base"), dtype="float32"), adapter_path=str(tmp_path / "peft"))
    tuner.configure_model()
    tuner.model.eval()
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        ours, want = tuner.model(input_ids=ids).logits, theirs(input_ids=ids).logits
        assert not torch.allclose(want, theirs.get_base_model()(input_ids=ids).logits * 0)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
    saved = load_file(tmp_path / "peft/adapter_model.safetensors")
    for name, tensor in adapter_tensors(tuner.model).items():
        key = name.replace("layers.", "base_model.model.", 1).replace("experts.", "lora_") + ".weight"
        assert torch.equal(tensor[0] if name.endswith("A") else tensor[0].t(), saved[key]), name
    assert tuner.adapter_config.dropout_input == options.get("lora_dropout", 0.0)
    assert tuner.adapter.config.scale() == (6.0 if options.get("use_rslora") else 3.0)


def test_peft_lora_trains_and_must_agree(folder: Path, tmp_path: Path, capsys: Any) -> None:
    peft_folder(folder / "base", tmp_path / "peft")
    start = ("--model.adapter_path", str(tmp_path / "peft"))
    assert fit(folder, tmp_path / "runs", *start, *LEARN) == 0
    agreed = ("--config", "method/lora", "--model.adapter.rank", "4", "--model.adapter.alpha", "12")
    assert fit(folder, tmp_path / "agreed", *start, *agreed, "--model.adapter.targets", "[down_proj, q_proj]") == 0
    assert fit(folder, tmp_path / "refused", *start, "--config", "method/lora") == 2
    said = capsys.readouterr().err
    assert "rank of one expert: 4 in the adapter, 32 in this run" in said
    assert "scale (alpha / rank): 3.0 in the adapter, 2.0 in this run" in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"rank_pattern": {"down_proj": 2}}, "unequal (rank, alpha)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    ],
)
def test_peft_adapters_that_are_no_plain_lora_are_refused_by_name(
    folder: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    peft_folder(folder / "base", tmp_path / "peft", **options)
    with pytest.raises(UserError, match=r"model\.adapter_path") as error:
        FineTuner(BaseModel(str(folder / "base")), adapter_path=str(tmp_path / "peft"))
    assert named in str(error.value)


def test_peft_tensors_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    peft_folder(folder / "base", tmp_path / "peft")
    path = tmp_path / "peft/adapter_model.safetensors"
    save_file({k.replace("layers.0", "layers.77"): v for k, v in load_file(path).items()}, path)
    tuner = FineTuner(BaseModel(str(folder / "base")), adapter_path=str(tmp_path / "peft"))
    with pytest.raises(UserError, match=r"layers\.77"):
        tuner.check()
