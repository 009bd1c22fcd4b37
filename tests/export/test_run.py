"""From a run to a folder: the callback, the export command, merging, what the card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from talklora_pl.cli import main
from tests.data.tiny import save_model
from tests.export import models

PLAIN = {"experts": "lora", "communication": "none", "router": "uniform", "num_experts": 1, "rank": 4}
SMALL = {"rank": 8, "dropout_input": 0.0}


def fit(root: Path, adapter: dict, base: dict | None = None, data: dict | None = None, **trainer: object) -> Path:
    """Folder of a short run."""
    save_model(root / "base", num_labels=3)
    rows = [{"question": f"{i} and one?", "choices": [str(i + 1), str(i + 3)], "label": 0} for i in range(40)]
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = data or {"train": str(root / "rows.jsonl"), "rows": "choice", "format": "cloze"}
    config = {
        "model": {
            "base": {"path": str(root / "base"), "dtype": "float32", **(base or {})},
            "adapter": {**SMALL, **adapter},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
        },
        "data": {"val_size": 0.2, "max_length": 64, **data},
        "export": {"license": "apache-2.0"},
        "trainer": {
            "max_steps": 8,
            "val_check_interval": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "default_root_dir": str(root / "runs"),
            "log_every_n_steps": 1,
            **trainer,
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(root / "config.yaml")]) == 0
    return root / "runs" / "version_0"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def test_a_fit_leaves_the_last_and_the_best_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(tmp_path, {})
    for name in ("last", "best"):
        state = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        got = tensors(run / "adapters" / name)
        assert {f"model.talklora.default.{k}" for k in got} == set(state)
        assert all(torch.equal(v, state[f"model.talklora.default.{k}"]) for k, v in got.items())
        AutoModelForCausalLM.from_pretrained(run / "adapters" / name, trust_remote_code=True)
        assert AutoTokenizer.from_pretrained(run / "adapters" / name)("a b").input_ids
    assert sorted(p.name for p in (run / "adapters").iterdir()) == ["best", "last"]  # nothing half written is left

    # the command gives the same folder as the callback
    assert main(["export", str(run), "--out", str(tmp_path / "exported"), "--license", "mit"]) == 0
    same, other = tensors(tmp_path / "exported"), tensors(run / "adapters" / "best")
    assert same.keys() == other.keys() and all(torch.equal(same[k], other[k]) for k in same)
    card = (tmp_path / "exported" / "README.md").read_text()
    for words in (
        "license: mit",
        "rows.jsonl",
        "val_loss",
        "load/",
        "talking",
        "from_pretrained",
        "experts per module",
    ):
        assert words in card, words
    assert "license: apache-2.0" in (run / "adapters" / "last" / "README.md").read_text()

    # routed by the token: no merge, and nothing is written
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(tmp_path / "merged"), "--merge"]) == 2
    message = capsys.readouterr().err
    assert "router 'softmax' weighs the experts anew for every token" in message and "load_adapter" in message
    assert not (tmp_path / "merged").exists()


def test_plain_lora_is_also_a_peft_folder_and_merges(tmp_path: Path) -> None:
    from peft import PeftModel

    run = fit(tmp_path, PLAIN)
    ids = torch.arange(12).reshape(2, 6)
    want = AutoModelForCausalLM.from_pretrained(run / "adapters" / "last", trust_remote_code=True)(ids).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (base(ids).logits - want).abs().max() > 1e-3
    by_peft = PeftModel.from_pretrained(base, str(run / "adapters" / "last" / "peft"))
    assert torch.allclose(by_peft(ids).logits, want, atol=1e-5)
    arguments = ["export", str(run / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "merged"), "--merge"]
    assert main(arguments) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, want, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a").input_ids


def test_a_classifier_goes_with_its_head_and_its_class_names(tmp_path: Path) -> None:
    from transformers import pipeline

    rows = [{"text": f"{i} is {'even' if i % 2 == 0 else 'odd'}", "label": i % 2} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"train": str(tmp_path / "texts.jsonl"), "rows": "classification", "labels": ["even", "odd"]}
    run = fit(tmp_path, {}, {"task": "sequence_classification", "num_labels": 2}, data)
    folder = run / "adapters" / "last"
    head = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["model.score.weight"]
    assert torch.equal(tensors(folder)["base.score.weight"], head)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model.score.weight, head)
    assert model.config.id2label == {0: "even", 1: "odd"}
    answers = pipeline("text-classification", model=str(folder), trust_remote_code=True)(["4 is even", "5 is odd"])
    assert {a["label"] for a in answers} <= {"even", "odd"}
    # a run stands for its adapter, which knows its task and its classes
    assert main(["inspect", str(run), "--text", "4 is even", "--output", str(tmp_path / "page.html")]) == 0


def test_export_leaves_what_it_cannot_replace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(fit(tmp_path, {}) / "checkpoints" / "last.ckpt")
    other = str(models.save_base(tmp_path / "gpt2", "gpt2"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    capsys.readouterr()
    for arguments, words in (
        (["--out", "."], "current folder"),
        (["--out", "/dev/null/x"], "cannot be written: "),
        (["--out", "x", "--base", other], "belongs to a llama model, and"),
    ):
        assert main(["export", checkpoint, *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, said
        assert list(Path.cwd().iterdir()) == []


def test_export_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    (tmp_path / "junk.ckpt").write_bytes(b"PK junk")
    for arguments, words in (
        (["nowhere.ckpt", "--out", "x"], "nowhere.ckpt"),
        ([str(tmp_path), "--out", "x"], "best.ckpt"),
        ([str(tmp_path / "junk.ckpt"), "--out", "x"], "junk.ckpt"),
        ([str(tmp_path / "junk.ckpt")], "--out"),
    ):
        assert main(["export", *arguments]) == 2
        assert words in capsys.readouterr().err
