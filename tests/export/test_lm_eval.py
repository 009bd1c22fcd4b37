"""The stock ``lm_eval`` command line on an exported folder, with a task of our own from a local file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from talklora_pl import AdapterConfig, export_adapter, load_adapter
from tests.export import models

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: eval)")
def test_lm_eval_command_line(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base", "llama")
    model = models.load(base)
    models.train(model, AdapterConfig(rank=8))
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = export_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    rows = [{"question": f"{i} and one?", "choices": [str(i + 1), str(i + 3)], "label": 0} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {
        "task": "tiny_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny_choices.yaml").write_text(yaml.safe_dump(task))
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "tiny_choices"]
    command += ["--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "4"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # where talklora_pl is not installed, it is imported from here
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]

    (file,) = tmp_path.glob("out/*/samples_tiny_choices_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 8
    ours = models.load(base)
    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    load_adapter(ours, folder)
    changes = []
    for sample in samples:
        for i, choice in enumerate(sample["doc"]["choices"]):
            prompt = f"Question: {sample['doc']['question']}\nAnswer:"
            want = loglikelihood(ours, tokenizer, prompt, f" {choice}")
            got = float(sample["filtered_resps"][i][0])
            assert got == pytest.approx(want, abs=1e-4)
            changes.append(abs(loglikelihood(bare, tokenizer, prompt, f" {choice}") - want))
    assert max(changes) > 1e-3  # so the adapter was there


@torch.no_grad()
def loglikelihood(model: torch.nn.Module, tokenizer: object, prompt: str, answer: str) -> float:
    before, full = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, prompt + answer))  # type: ignore[operator]
    start = before.shape[1]
    logp = model(full).logits[0, start - 1 : -1].log_softmax(-1)
    return logp.gather(1, full[0, start:, None]).sum().item()
