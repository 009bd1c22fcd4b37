"""The command line as a user meets it: a fit from YAML, resume, and one message for every mistake."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from lightning_utilities.core.imports import RequirementCache

from talklora_pl.cli import main
from talklora_pl.cli.lightning import run
from tests.data.tiny import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model, a few rows and a config."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    save_model(folder / "base")
    rows = [{"question": f"{i} and one?", "choices": [str(i + 1), str(i + 3)], "label": 0} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = {
        "model": {
            "base": {"path": str(folder / "base"), "dtype": "float32"},
            "adapter": {"rank": 8, "dropout_input": 0.0},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "lr_scheduler": {"class_path": "talklora_pl.optim.WarmupLinear", "init_args": {"warmup_steps": 2}},
        },
        "data": {
            "train": str(folder / "rows.jsonl"),
            "rows": "choice",
            "format": "cloze",
            "val_size": 0.2,
            "max_length": 64,
        },
        "trainer": {"max_steps": 6, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def fit(folder: Path, root: Path, *args: str) -> int:
    return main(["fit", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(root), *args])


def scalars(root: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = root.glob("version_0")
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_fit_trains_logs_and_keeps_what_was_trained(folder: Path, tmp_path: Path) -> None:
    assert fit(folder, tmp_path, "--trainer.max_steps", "30", "--trainer.val_check_interval", "4") == 0
    logged = scalars(tmp_path)
    assert sum(logged["train_loss"][-5:]) < sum(logged["train_loss"][:5])
    assert logged["val_loss"][-1] < logged["val_loss"][0]
    assert "val_accuracy" in logged
    checkpoints = tmp_path / "version_0" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"}
    checkpoint = torch.load(checkpoints / "last.ckpt", weights_only=True)
    assert all(k.startswith("model.talklora.default.") for k in checkpoint["state_dict"])
    assert checkpoint["talklora"]["adapter"]["communication"] == {"name": "talking", "init": "random"}
    assert checkpoint["global_step"] == 30


def test_resume_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    """Six steps in one go and in two pieces end in the same bits."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    schedule = ("--model.lr_scheduler.total_steps", "6")
    assert fit(folder, whole, *schedule) == 0
    assert fit(folder, pieces, *schedule, "--trainer.max_steps", "3", "--checkpoint.every_n_train_steps", "3") == 0
    last = pieces / "version_0" / "checkpoints" / "last.ckpt"
    assert fit(folder, pieces, *schedule, "--ckpt_path", str(last)) == 0
    # a resumed run goes on in the folder of the interrupted one
    ends = [
        torch.load(p / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for p in (whole, pieces)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    with pytest.warns(UserWarning, match="had seed .*, this one has 7"):
        assert fit(folder, pieces, *schedule, "--ckpt_path", str(last), "--seed_everything", "7") == 0


def test_components_by_name_and_the_last_option_wins(folder: Path, tmp_path: Path, capsys: Any) -> None:
    moelora = tmp_path / "moelora.yaml"
    adapter: dict[str, Any] = {"experts": "split_lora", "communication": "none", "router": "softmax"}
    moelora.write_text(yaml.safe_dump({"model": {"adapter": adapter}}))
    args = ["--config", str(moelora), "--model.adapter.communication", "talking", "--model.adapter.communication.init"]
    with pytest.raises(SystemExit) as end:
        fit(folder, tmp_path, *args, "identity", "--print_config")
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    parts = yaml.safe_load(printed)["model"]["adapter"]
    assert parts["experts"]["class_path"] == "talklora_pl.experts.lora.SplitLoRA"
    assert parts["communication"]["init_args"] == {"init": "identity"}
    # what is printed is a config that runs
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert main(["fit", "--config", str(again), "--trainer.max_steps", "1"]) == 0


def test_sources_with_options_are_kept_in_the_config(folder: Path, tmp_path: Path) -> None:
    """The config.yaml of a run is one that runs, also where a source is a mapping."""
    (tmp_path / "data.yaml").write_text(f"data: {{train: [{{path: {folder / 'rows.jsonl'}, limit: 20}}]}}")
    once = ["--trainer.max_steps", "1"]
    assert fit(folder, tmp_path / "a", "--config", str(tmp_path / "data.yaml"), *once) == 0
    config = tmp_path / "a" / "version_0" / "config.yaml"
    (source,) = yaml.safe_load(config.read_text())["data"]["train"]
    assert source["limit"] == 20
    assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "b")]) == 0


@pytest.mark.parametrize(
    "option, value",
    [
        ("communication=gnn --model.adapter.communication.graph", "circle"),
        ("communication=gnn --model.adapter.communication.rounds", "two"),
        ("communication=attention --model.adapter.communication.heads", "three"),
        ("balance+=switch --model.adapter.balance.scope", "modl"),
        ("router=top_k --model.adapter.router.k", "x"),
        ("experts=shared_b --model.adapter.alpha", "-1"),
    ],
)
def test_options_of_parts_have_types(folder: Path, tmp_path: Path, capsys: Any, option: str, value: str) -> None:
    assert fit(folder, tmp_path, *f"--model.adapter.{option} {value}".split()) == 2
    said = capsys.readouterr().err
    assert option.rsplit(".", 1)[-1] in said and value in said, said


def test_evaluation_says_when_there_is_nothing_to_evaluate(folder: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["test", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    argv += ["--data.test", str(folder / "rows.jsonl")]
    with pytest.warns(UserWarning, match="test without --ckpt_path .* the adapter is untrained"):
        assert main(argv) == 0
    assert main([*argv, "--ckpt_path", "last"]) == 2
    assert "--ckpt_path last: there is none in" in capsys.readouterr().err
    assert main([*argv, "--ckpt_path", str(folder)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_fast_dev_run(folder: Path, tmp_path: Path) -> None:
    """One batch of everything, with all callbacks and a logger that keeps nothing."""
    assert fit(folder, tmp_path, "--trainer.fast_dev_run", "true") == 0
    assert list(tmp_path.iterdir()) == []


def test_the_progress_bar_knows_no_last_epoch(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Where only ``max_steps`` is given; Lightning's own bar says ``Epoch 0/-2``."""
    assert fit(folder, tmp_path, "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "true") == 0
    printed = capsys.readouterr().out
    assert "Epoch 0 " in printed and "/-2" not in printed


def test_parameter_groups_have_their_own_rates(folder: Path, tmp_path: Path) -> None:
    groups = json.dumps([{"match": r"router\.", "lr": 0.5}, {"match": r"communication\.", "weight_decay": 0.0}])
    assert fit(folder, tmp_path, f"--model.param_groups={groups}", "--trainer.max_steps", "1") == 0
    state = torch.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert [g["initial_lr"] for g in state["param_groups"]] == [0.01, 0.5, 0.01]
    assert [g["weight_decay"] for g in state["param_groups"]] == [0.01, 0.01, 0.0]
    assert [len(g["params"]) for g in state["param_groups"]] == [5 + 10 * 2, 10, 10]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--model.adapter.communication", "talkng"],
            ["Unknown communication 'talkng'", "Did you mean 'talking'?", "plugins"],
        ),
        (["--model.adapter.router", "sofmax"], ["Unknown router 'sofmax'", "'softmax'"]),
        (["--model.adapter.communication.heds", "3"], ["no option 'heds'", "Choices: init"]),
        (["--model.adapter.ranc", "8"], ["no option 'model.adapter.ranc'", "model.adapter.rank"]),
        (["--trainer.max_stepz", "8"], ["no option 'trainer.max_stepz'", "trainer.max_steps"]),
        (["--model.adapter.rank", "7"], ["rank 7 is not divisible by num_experts 4"]),
        (["--model.adapter.rank", "many"], ["model.adapter.rank", "int"]),
        (["--model.adapter.targets=[qproj]"], ["'qproj'", "Did you mean 'q_proj'"]),
        (["--model.base.path", "no/such/model"], ["model.base.path", "no/such/model"]),
        (["--data.train", "no_such.jsonl"], ["no_such.jsonl"]),
        (["--config", "methd/talklora"], ["no file 'methd/talklora'"]),
        (["--plugins", "[no_such_module]"], ["importing 'no_such_module' failed"]),
        (["--plugins", "[missing.py]"], ["no file 'missing.py'"]),
        (['--model.param_groups=[{"match": "nothing"}]'], ["'nothing' matches no trained tensor", "layers."]),
    ],
)
def test_a_mistake_is_one_message(folder: Path, tmp_path: Path, capsys: Any, args: list[str], words: list[str]) -> None:
    assert fit(folder, tmp_path, *args) == 2
    err = capsys.readouterr().err
    message = err[err.index("error: ") :]
    assert "Traceback" not in err
    assert all(w in message for w in words), message
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_broken_configs_are_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    for text, words in (
        ("model: [", "not readable as YAML"),
        ("- a", "a config is a mapping"),
        ("model: {adaptr: {rank: 1}}", "adaptr"),
    ):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        assert fit(folder, tmp_path, "--config", str(path)) == 2
        assert words in capsys.readouterr().err


def test_unknown_verb(capsys: Any) -> None:
    assert main(["fitt"]) == 2
    assert "Did you mean 'fit'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_a_file_of_any_kind_is_a_path_not_a_piece_of_config(folder: Path, tmp_path: Path, kind: str) -> None:
    """JSON and CSV are valid YAML too, so the parser of the command line might take the file for an option's value."""
    table = pd.DataFrame([{"prompt": f'Repeat {i}, "please"\nnow', "completion": str(i)} for i in range(8)])
    path = tmp_path / f"rows.{kind}"
    write: dict[str, Any] = {
        "json": lambda: path.write_text(table.to_json(orient="records")),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "csv": lambda: table.to_csv(path, index=False),
        "tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "parquet": lambda: table.to_parquet(path),
    }
    write[kind]()
    options = f"--data.train {path} --data.rows completion --data.format plain --data.val_size 0".split()
    options += f"--trainer.default_root_dir {tmp_path} --trainer.max_steps 1".split()
    cli = run("fit", ["--config", str(folder / "config.yaml"), *options])
    assert len(cli.datamodule.tables["train"]) == 8


def test_all_mistakes_of_a_configuration_come_in_one_message(folder: Path, tmp_path: Path, capsys: Any) -> None:
    config = {
        "model": {
            "adapter": {
                "rank": "many",
                "balance": ["switch", "nope"],
                "communication": {"class_path": "gnn", "init_args": {"graph": "ring"}},
            },
            "optimizer": {"class_path": "torch.optim.AdamX"},
        },
        "data": {"train": [{"path": "x", "rowz": "choice"}], "on_bad_row": "skp"},
        "trainer": {"max_stepz": 3},
    }
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(config))
    assert (
        fit(folder, tmp_path, "--config", str(path), "--data.batch_sise=3", "--model.adapter.targets", "[qproj]") == 2
    )
    first, *problems = capsys.readouterr().err.strip().splitlines()
    assert first == "error: The configuration cannot be used:"
    for (start, *words), problem in zip(
        (
            (f"{path}: data.on_bad_row: 'skp'", "Did you mean 'skip'"),
            (f"{path}: data.train: ", "'rowz'"),
            (f"{path}: model.adapter.balance: Unknown balance loss 'nope'", "switch"),
            (f"{path}: model.adapter.rank: many is not int or null.",),
            (f"{path}: model.optimizer: ", "AdamX"),
            (f"{path}: trainer.max_stepz: ", "trainer.max_steps"),
            ("data.batch_sise: ", "data.batch_size"),
        ),
        problems,
        strict=True,
    ):
        assert problem.strip().startswith(start), problem
        assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--model.adapter.rank 7 --model.adapter.targets [q_prj] --model.optimizer.lr -1 --data.train none.csv",
            ("rank 7 is not divisible", "'q_prj'", "model.optimizer: Invalid learning", "none.csv: there is no such"),
        ),
        (
            "--trainer.accelerator gpuu --model.adapter.rank 7 --data.train none.csv",
            ("accelerator='gpuu'", "rank 7 is not divisible", "none.csv: there is no such file"),
        ),
        (
            "--trainer.max_stepz 3 --model.adapter.rank 7 --data.train none.csv",
            ("trainer.max_steps", "rank 7 is not divisible", "none.csv: there is no such file"),
        ),
        (
            "--model.optimizer Adm --model.adapter.router.temperature 0 --data.train none.csv",
            ("'Adm'", "temperature must be > 0", "none.csv: there is no such file"),
        ),
    ],
)
def test_mistakes_of_several_parts_come_in_one_message(
    folder: Path, tmp_path: Path, capsys: Any, options: str, said: tuple[str, ...]
) -> None:
    assert fit(folder, tmp_path, *options.split()) == 2
    err = capsys.readouterr().err
    assert all(err.count(words) == 1 for words in said), err


def test_no_problem_follows_from_leaving_out_a_wrong_option(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Without its rank the adapter would lack one, and without its path the data."""
    (tmp_path / "wrong.yaml").write_text("{model: {adapter: {rank: many}}, data: {train: 3}}")
    (tmp_path / "base.yaml").write_text(f"model: {{base: {{path: {folder / 'base'}}}}}")
    options = [f"--config={tmp_path / name}" for name in ("base.yaml", "wrong.yaml")]
    assert main(["fit", *options]) == 2
    _, *problems = capsys.readouterr().err.strip().splitlines()
    assert len(problems) == 2 and "rank: many" in problems[0] and "data.train: 3" in problems[1], problems


def test_what_is_missing_is_named(folder: Path, capsys: Any) -> None:
    assert main(["fit", "--data.train", str(folder / "rows.jsonl")]) == 2
    assert "model.base.path is required" in capsys.readouterr().err


def test_a_mistake_before_the_base_is_not_blamed_on_it(folder: Path, capsys: Any) -> None:
    assert (
        main(["fit", "--data.batch_sise=3", "--trainer.precision", "7", "--config", str(folder / "config.yaml")]) == 2
    )
    _, *problems = capsys.readouterr().err.strip().splitlines()
    assert len(problems) == 2 and "data.batch_size" in problems[0]
    assert "trainer.precision: '7' is not one of its values" in problems[1] and "bf16-mixed" in problems[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config"], "--config: which?"),
        (["--plugins=[1"], "--plugins is not readable as YAML"),
        (["--plugins=7"], "plugins: a list of modules"),
        (["--data.batch_size", "0"], "data.batch_size: 0 is less than 1"),
        (["--data.max_length", "0", "--data.num_workers", "-1"], "data.num_workers: -1 is less than 0"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches: 0 is less than 1"),
        (["--trainer.devices", "1.5"], "trainer: `devices`"),
        (["--trainer.limit_train_batches", "0.001"], "trainer: You requested to check 0.001 of the"),
        (["--checkpoint.dirpath", "/proc/nowhere"], "checkpoint.dirpath: /proc/nowhere cannot be made"),
        (["--trainer.default_root_dir", "/proc/nowhere"], "trainer.default_root_dir: /proc/nowhere cannot be made"),
        (["--model.adapter.router.temperature", "0"], "model.adapter.router.temperature: temperature must be > 0"),
        (
            ["--model.adapter.communication=gnn", "--model.adapter.communication.density=7"],
            "model.adapter.communication.density: density must be in [0, 1], got 7",
        ),
        (
            ["--model.adapter.router=top_k", "--model.adapter.router.k=0"],
            "router.k: k must be at least 1",
        ),
        (
            ["--model.adapter.router=loss_free", "--model.adapter.router.k=[2, 0]"],
            "router.k: k must be at least 1, got [2, 0]",
        ),
        (
            ["--model.adapter.router=top_k", "--model.adapter.router.k=[2, 2, 1]"],
            "router 'top_k': k lists 3 numbers, but the model has 2 decoder layers.",
        ),
        (
            ["--model.adapter.router=noisy_top_k", "--model.adapter.router.k={8: 3, 2: 1}"],
            "k has no entry for the 4 experts of 'model.layers.0.self_attn.q_proj', only for 2, 8.",
        ),
        (["--model.optimizer", "AdamW", "--model.optimizer.lr", "-1"], "model.optimizer: Invalid learning rate: -1"),
        (["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=1"], "model.lr_scheduler: You must define"),
        (["--model.adapter.plain", "7"], "model.adapter.plain: 7 is not a mapping of options or null."),
        (["data.train=x"], "data.train: options begin with two dashes: --data.train"),
        (["--model.base", "../own/tiny"], "Write model.base: {path: ../own/tiny}, or --model.base.path ../own/tiny."),
        (
            ["--model.adapter.balance", "localised"],
            "model.adapter.balance: localised is not a list. Write [localised].",
        ),
        (["--model.param_groups", "[{match: router, lr: -2}]"], "model.param_groups: lr must be at least 0, got -2"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs=-3"],
            "trainer.callbacks.every_n_epochs: Invalid value for every_n_epochs=-3",
        ),
    ],
)
def test_mistakes_without_a_traceback(folder: Path, tmp_path: Path, capsys: Any, options: list[str], said: str) -> None:
    assert fit(folder, tmp_path, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model.optimizer Adm", "model.optimizer: There is no optimizer 'Adm'. Did you mean 'Adam'"),
        ("--model.lr_scheduler WarmupLinea", "no learning-rate schedule 'WarmupLinea'. Did you mean 'WarmupLinear'"),
        (
            "--model.lr_scheduler NoSuch --model.lr_scheduler.step_size 3",
            "model.lr_scheduler: There is no learning-rate schedule 'NoSuch'. Choices: ",
        ),
        (
            "--trainer.callbacks+=EarlyStoping",
            "callbacks: There is no callback 'EarlyStoping'. Did you mean 'EarlySt",
        ),
        ("--trainer.logger TensorBordLogger", "no logger 'TensorBordLogger'. Did you mean 'TensorBoardLogger'"),
        (
            "--model.adapter.communication gnn --model.adapter.communication.grph complete",
            "model.adapter.communication.grph: The chosen component has no option 'grph'. Did you mean 'graph'?",
        ),
        ("--model.adapter.router.tempratur 2", "Did you mean 'temperature'? Choices: init, per, scores, temperature."),
        ("--model.adapter.balance '[{class_path: switch, init_args: {weigth: 2}}]'", "Did you mean 'weight'?"),
        ("--model.optimizer SGD --model.optimizer.momentun 0.9", "Did you mean 'momentum'?"),
        ("--trainer.callbacks+=RoutingSensitivity --trainer.callbacks.tokns 3", "Did you mean 'tokens'"),
    ],
)
def test_the_nearest_name_is_named(folder: Path, tmp_path: Path, capsys: Any, options: str, said: str) -> None:
    assert fit(folder, tmp_path, *shlex.split(options)) == 2
    _, *problems = capsys.readouterr().err.strip().splitlines()
    assert len(problems) == 1 and said in problems[0], problems


def test_unknown_options_in_a_config(folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "wrong.yaml"
    data = "{train: [{path: x, limt: 3}], test: {path: x, split: y}}"
    path.write_text(f"model: {{base: {{dtyp: float32}}}}\ndata: {data}\n")
    assert fit(folder, tmp_path, "--config", str(path)) == 2
    problems = capsys.readouterr().err
    assert f"{path}: model.base.dtyp: There is no option 'model.base.dtyp'. Did you mean model.base.dtype" in problems
    assert f"{path}: data.train: The chosen component has no option 'limt'. Did you mean 'limit'" in problems
    assert problems.count("data.test: {'path': 'x', 'split': 'y'} is not") == problems.count("data.test") == 1
    assert "Write [{'path': 'x', 'split': 'y'}]." in problems


def test_schedules_of_the_package_by_their_bare_name(folder: Path, tmp_path: Path) -> None:
    assert fit(folder, tmp_path, "--model.lr_scheduler=WarmupCosine", "--trainer.fast_dev_run=true") == 0


def test_a_trainer_option_that_lightning_refuses_has_no_traceback(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert fit(folder, tmp_path, "--trainer.strategy", "dpp") == 2
    assert "error: trainer: " in capsys.readouterr().err


def test_a_logger_whose_package_is_not_installed_is_refused(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = RequirementCache("no_such_package")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", missing)
    assert fit(folder, tmp_path, "--trainer.logger", "WandbLogger") == 2
    said = capsys.readouterr().err
    assert "trainer.logger" in said and "no_such_package" in said and "Traceback" not in said


def test_evaluation_with_other_options_than_the_checkpoints_is_refused(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert fit(folder, tmp_path, "--trainer.max_steps", "1") == 0
    (kept,) = tmp_path.rglob("last.ckpt")
    config = (tmp_path / "version_0" / "config.yaml").read_text()
    options = ["validate", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    options += ["--ckpt_path", str(kept)]
    assert main([*options, "--model.adapter.alpha", "64"]) == 2
    assert "adapter.alpha: None in the checkpoint, 64.0 in this run" in capsys.readouterr().err
    assert main(options) == 0
    assert (tmp_path / "version_0" / "config.yaml").read_text() == config
