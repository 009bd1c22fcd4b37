"""``evaluate``: predictions that give the numbers again, base beside adapter, classifiers, lm-eval."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from talklora_pl import AdapterConfig, export_adapter, load_adapter
from talklora_pl.cli import main
from talklora_pl.data import formats
from talklora_pl.data.example import Example
from talklora_pl.tasks.scores import measure
from talklora_pl.tasks.task import read_tasks
from tests.data.tiny import SIZES, save_model, tokenizer
from tests.export import models
from tests.tasks import hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it, and the data sets."""
    root = tmp_path_factory.mktemp("evaluate")
    hub.write(root / "hub")
    base = save_model(root / "base", max_position_embeddings=600)
    model = models.load(Path(base.path))
    models.train(model, AdapterConfig(rank=8))
    export_adapter(model, root / "adapter", tokenizer=tokenizer())
    return root


def run(place: Path, out: Path, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    argv = ["evaluate", "--data", str(place / "hub"), "--out", str(out), "--dtype", "float32", *options]
    assert main(argv) == 0
    file = out / "predictions.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return json.loads((out / "scores.json").read_text()), records


def test_numbers_come_from_the_predictions(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "boolq,arc_easy", "--by", "generation,ranking,cloze", "--max_new_tokens", "3"]
    adapter = str(place / "adapter")
    scores, records = run(place, tmp_path / "both", *options, "--adapter", adapter, "--num_beams", "2")
    shown = capsys.readouterr().out
    assert len(records) == 3 * (2 + 2) and "arc_easy" in shown and "mean" in shown
    tasks = {task.name: task for task in read_tasks("boolq,arc_easy")}
    for name, ways in scores["tasks"].items():
        for way, entry in ways.items():
            own = [r for r in records if (r["task"], r["by"]) == (name, way)]
            assert entry["questions"] == len(own)
            for side in ("base", "adapter"):
                assert entry[side] == measure(tasks[name], own, side)
                assert all(("text" in r[side]) == (way == "generation") for r in own)
    for way, sides in scores["mean"].items():
        for side, mean in sides.items():
            assert mean == sum(ways[way][side]["accuracy"] for ways in scores["tasks"].values()) / 2
    # the base beside an adapter is the base alone
    _, of_base = run(place, tmp_path / "base", *options, "--base", str(place / "base"), "--num_beams", "2")
    assert [r["base"] for r in of_base] == [r["base"] for r in records] and "adapter" not in of_base[0]
    assert any(r["base"]["scores"] != r["adapter"]["scores"] for r in records)
    # scores of the choices are those of the whole rows, one by one
    model = AutoModelForCausalLM.from_pretrained(place / "base", attn_implementation="eager").eval()
    load_adapter(model, adapter)
    for record in records:
        if record["by"] == "ranking":
            task = tasks[record["task"]]
            asked = {q["id"]: q for q in task.questions(task.split, str(place / "hub"))}[record["id"]]
            want = [mean_nll(model, asked["instruction"], output) for output in asked["outputs"]]
            assert record["adapter"]["scores"] == pytest.approx([-nll for nll in want], abs=1e-5)
            assert record["adapter"]["pick"] == min(range(len(want)), key=want.__getitem__)


@torch.no_grad()
def mean_nll(model: Any, instruction: str, answer: str) -> float:
    written = formats.write(Example(prompt=instruction, answers=[answer]), "alpaca")
    encode = tokenizer()
    before, row = encode(written.prompt).input_ids, [*encode(written.prompt + written.answers[0]).input_ids, 257]
    logp = model(torch.tensor([row])).logits[0].log_softmax(-1)
    scored = range(len(before), len(row))
    return -sum(logp[i - 1, row[i]].item() for i in scored) / len(scored)


def test_a_classifier_by_the_names_of_its_classes(place: Path, tmp_path: Path) -> None:
    names = ["Positive", "NEGATIVE"]  # the other way round than on the hub, and in other letters
    config = LlamaConfig(vocab_size=264, num_labels=2, id2label=dict(enumerate(names)), pad_token_id=257, **SIZES)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    options = ["--base", str(tmp_path / "base"), "--task", "sequence_classification"]
    scores, records = run(place, tmp_path / "out", *options, "--tasks", "sst2")
    assert (
        scores["tasks"]["sst2"]["classes"]["base"]["accuracy"]
        == sum(r["base"]["pick"] == r["label"] for r in records) / 6
    )
    for record, (word, _) in zip(records, [("a fine", 1), ("a dull", 0)] * 3):
        with torch.no_grad():
            best = model(tokenizer()(f"{word} film", return_tensors="pt").input_ids).logits.argmax().item()
        assert ["negative", "positive"][record["base"]["pick"]] == names[best].lower()
        assert record["base"]["scores"][record["base"]["pick"]] == max(record["base"]["scores"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--adapter FOLDER, --base MODEL, or both"),
        (["--base", "b"], "--tasks commonsense, or --harness TASKS"),
        (["--base", "b", "--tasks", "boolq", "--by", "luck"], "'luck' is none of generation, ranking, cloze"),
        (["--base", "b", "--tasks", "boolq", "--limit", "0"], "--limit 0 is less than 1"),
        (["--base", "b", "--tasks", "boolq", "--out", "."], "scores.json is there already"),
        (["--base", "b", "--tasks", "boolq", "--data", "."], "hf download google/boolq"),
        (["--base", "b", "--harness", "arc_easy"], "pip install 'talklora-pl[eval]'"),
    ],
)
def test_mistakes_are_one_message(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.json").touch()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra: eval)")
def test_harness_picks_what_its_own_command_line_picks(place: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{i} and one?", "choices": [str(i + 1), str(i + 3), "none"], "label": 0} for i in range(20)]
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
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "tiny_choices.yaml").write_text(yaml.safe_dump(task))
    scores, _ = run(
        place, tmp_path / "ours", "--adapter", str(place / "adapter"), "--harness", "tiny_choices",
        "--harness_include", str(tmp_path), "--batch_size", "4",
    )  # fmt: skip
    ours = [json.loads(line) for line in (tmp_path / "ours/harness_samples.jsonl").read_text().splitlines()]
    picks = {}
    for side, folder in (("base", place / "base"), ("adapter", place / "adapter")):
        arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments]
        command += ["--tasks", "tiny_choices", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "4"]
        command += ["--output_path", str(tmp_path / side), "--log_samples"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = (tmp_path / side).glob("*/samples_tiny_choices_*.jsonl")
        theirs = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda r: r["doc_id"])
        mine = sorted((r for r in ours if r["side"] == side), key=lambda r: r["doc_id"])
        likelihoods = [[[float(x[0]) for x in r["filtered_resps"]] for r in rs] for rs in (mine, theirs)]
        assert len(mine) == len(theirs) == 20
        torch.testing.assert_close(*map(torch.tensor, likelihoods), rtol=0, atol=1e-5)
        picks[side] = [[max(range(3), key=row.__getitem__) for row in rows] for rows in likelihoods]
        assert picks[side][0] == picks[side][1]
        for metric in ("acc", "acc_norm"):
            assert scores["harness"]["tiny_choices"][side][metric] == sum(r[metric] for r in theirs) / 20
    base, adapter = (
        torch.tensor([[float(x[0]) for x in r["filtered_resps"]] for r in ours if r["side"] == s])
        for s in ("base", "adapter")
    )
    assert (base - adapter).abs().max() > 1e-3  # so the adapter was off and on
