"""Options that cannot be meant, each with its one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from talklora_pl.adapter.config import AdapterConfig, PlainLoRA
from talklora_pl.allocation.alpha import Alpha
from talklora_pl.balance.localised import Localised
from talklora_pl.balance.normal import Normal
from talklora_pl.cli import main
from talklora_pl.errors import UserError
from talklora_pl.study.plan import read_study
from talklora_pl.tasks.task import read_file

ADAPTER: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
    ({"rank": None, "expert_rank": 0}, "expert_rank must be at least 1, got 0"),
    ({"rank": 8, "expert_rank": 2}, "exclude each other"),
    ({"rank": 9, "num_experts": 4}, "rank 9 is not divisible by num_experts 4"),
    ({"alpha": -1.0}, "alpha must be above 0, got -1"),
    ({"dropout_routing": 1.0}, r"dropout_routing must be in \[0, 1\), got 1"),
    ({"init_from": ["a"], "init_noise": 0.0}, "init_noise must be above 0, got 0.0"),
    ({"init_from": ["a", "b"], "init_weights": [1.0]}, "init_weights has 1 numbers for 2 folders"),
    ({"plain": PlainLoRA(targets=["q_proj"], rank=0)}, "plain.rank must be at least 1, got 0"),
]


@pytest.mark.parametrize("options, said", ADAPTER)
def test_adapter(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AdapterConfig(**{"rank": 8, **options}).validate()


PARTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Alpha(beta=float("inf")), "beta = inf must be a finite number"),
    (lambda: Alpha(budget=0), "budget = 0 must be at least 1"),
    (lambda: Localised(delta=1.0), r"delta must be in \[0, 1\), got 1.0"),
    (lambda: Normal(decay=-0.1), r"decay must be in \[0, 1\), got -0.1"),
]


@pytest.mark.parametrize("make, said", PARTS)
def test_parts(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        make()


STUDY = {
    "methods: 3": r"methods: names with configs, not 3",
    "methods: {a/b: method/lora}": "methods: 'a/b' is not the name of a folder",
    "methods: {a: {config: method/lora, sets: {}}}": "methods.a: unknown entry 'sets'",
    "methods: [method/lora]\nsearch: {model.optimizer.init_args.lr: 0.1}": "a list of values to try",
    "methods: [method/lora]\nset: [1]": r"set and search: options by dotted key, not \[1\]",
    "methods: [method/lora]\nmargin: -1": "margin: a difference of scores, not -1",
    "methods: [method/lora]\nseeds: []": r"seeds: how many, or a list of whole numbers; not \[\]",
    "methods: [method/lora]\nselect: loss": "select: 'loss' is not a score of the validation data",
    "methods: [method/lora]\nbaseline: lara": "baseline: 'lara' is not one of the methods. Did you mean 'lora'",
    "- method/lora": "a study is a mapping with methods, seeds and more",
    "seeds: 2": "methods: none is given",
}
FILES = {
    read_study: STUDY,
    read_file: {
        "- a": "tasks are a mapping of names to entries",
        "a: [": "is not readable as YAML",
    },
}


@pytest.mark.parametrize("read, text", [(read, text) for read, texts in FILES.items() for text in texts])
def test_files(read: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=FILES[read][text]):
        read(file)


COMMANDS: list[tuple[list[str], str]] = [
    (["export", "x", "--out", "y", "--merge", "exact", "--push", "me/model"], "--push and --license do not apply"),
    (
        ["export", "x", "--out", "y", "--merge", "static", "--data", "z", "--push", "me/model"],
        "--push uploads an adapter",
    ),
    (["data", "write", "--tasks", "boolq", "--limit", "0"], "data write: --limit 0 is less than 1"),
    (["data", "write", "--tasks", "boolq", "--out", __file__], "is a file; name a folder"),
    (["evaluate", "--base", "x", "--tasks", "boolq", "--num_fewshot", "-1"], "--num_fewshot -1 is less than 0"),
    (["evaluate", "--base", "x", "--tasks", "boolq", "--out", __file__], "is a file; name a folder"),
    (["evaluate", "--base", "x", "--tasks", "boolq,boolq"], "two tasks are called 'boolq'"),
    (["evaluate", "--base", "x", "--tasks", "./absent.yaml"], "absent.yaml"),
    (["inspect", "x", "--text", "a", "--output", "absent/page.html"], "there is no folder 'absent'"),
]


@pytest.mark.parametrize("argv, said", COMMANDS)
def test_commands(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert said in " ".join(capsys.readouterr().err.split())
