"""A fit in Python is the command line's: same options, same checks, same adapter, same folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_file

import talklora_pl
from talklora_pl.adapter import AdapterConfig
from talklora_pl.api import Trained
from talklora_pl.base import BaseModel
from talklora_pl.cli import main
from talklora_pl.cli.options import adapter_options
from talklora_pl.data.source import Source
from talklora_pl.errors import UserError
from talklora_pl.export.run import export_checkpoint
from talklora_pl.routers.top_k import TopK
from tests.data.tiny import save_model
from tests.methods.test_configs import METHODS, config_of

ROWS = [{"prompt": f"{i} and one? ", "completion": str(i + 1)} for i in range(8)]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("api") / "base").path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def fit(base: Any, rows: Any = ROWS, **options: Any) -> Trained:
    options["trainer"] = QUIET | {"max_steps": 2} | options.get("trainer", {})
    options["data"] = {"batch_size": 2, "val_size": 2} | options.get("data", {})
    return talklora_pl.fit(base, rows, **options)


def test_importing_is_light_and_names_complete() -> None:
    code = (
        "import sys, talklora_pl; assert {'fit', 'method', 'UserError'} <= set(dir(talklora_pl)); "
        "assert 'talklora' in talklora_pl.methods(); "
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_file(name: str) -> None:
    assert talklora_pl.method(name) == config_of(name)


def test_methods_with_changes() -> None:
    assert talklora_pl.method() == talklora_pl.method("talklora")
    # "auto" is features where experts talk, and does not stay behind where another part takes the place of theirs
    assert talklora_pl.method("talklora", router={"scores": "auto"}).to_dict() == AdapterConfig().to_dict()
    assert AdapterConfig(num_experts=8).rank_per_expert() == 4 and AdapterConfig(expert_rank=3).rank_per_expert() == 3
    assert talklora_pl.method("talklora", expert_rank=4).rank is None
    gnn = talklora_pl.method("talklora_gnn", communication={"rounds": 3}, router=TopK(k=1), balance=["switch"])
    before = talklora_pl.method("talklora_gnn")
    assert gnn.communication == type(before.communication)(**vars(before.communication) | {"rounds": 3})
    assert (gnn.router, gnn.balance[0].name) == (TopK(k=1), "switch")
    for wrong, said in (
        (("talklra",), "no method 'talklra'. Did you mean 'talklora'"),
        (("talklora", "num_expert", 2), "no option 'num_expert'"),
        (("talklora", "communication", "gnnn"), "Unknown communication 'gnnn'. Did you mean 'gnn'"),
        (("talklora", "num_experts", 5), "rank 32 is not divisible by num_experts 5"),
    ):
        with pytest.raises(UserError, match=said):
            talklora_pl.method(wrong[0], **dict([wrong[1:]] if wrong[1:] else []))


def test_the_command_line_trains_the_same(base: str, here: Path) -> None:
    run = fit(base, data={"test": ROWS}, model={"optimizer.lr": 0.01, "adapter": {"expert_rank": 2, "rank": None}})
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = ["--config", "method/talklora", "--model.base.path", base, "--data.train", "rows.jsonl"]
    argv += ["--data.test", "rows.jsonl", "--data.batch_size", "2", "--data.val_size", "2", "--trainer.max_steps", "2"]
    argv += ["--model.optimizer.lr", "0.01", "--model.adapter.expert_rank", "2", "--model.adapter.rank", "null"]
    for name, value in QUIET.items():
        argv += [f"--trainer.{name}", str(value).lower()]
    assert main(["fit", *argv]) == 0
    assert run.folder == Path("runs/version_0")
    ours, theirs = (yaml.safe_load(Path(f"runs/version_{i}/config.yaml").read_text()) for i in (0, 1))
    assert {ours["data"].pop(k) for k in ("train", "test")} == {"8 rows in Python"}
    assert {theirs["data"].pop(k) for k in ("train", "test")} == {"rows.jsonl"}
    assert ours == theirs
    records = [json.loads(Path(f"runs/version_{i}/run.json").read_text()) for i in (0, 1)]
    assert records[0]["scores"] == records[1]["scores"] == {k: v for k, v in run.scores.items() if "val" in k}
    tensors, others = (load_file(f"runs/version_{i}/adapters/last/adapter.safetensors") for i in (0, 1))
    assert all(torch.equal(tensors[name], t) for name, t in others.items()) and len(tensors) == len(others)

    assert main(["predict", *argv, "--ckpt_path", "runs/version_1/checkpoints/last.ckpt"]) == 0
    written = [json.loads(line) for line in Path("runs/version_1/predictions.jsonl").read_text().splitlines()]
    got = run.predict(ROWS)
    assert [r["text"] for r in got] == [r["text"] for r in written] == run.generate([r["prompt"] for r in ROWS])
    assert run.generate(ROWS[3]["prompt"]) == got[3]["text"]
    for wrong in (3, [ROWS[3]]):
        with pytest.raises(UserError, match="generate: give a text or a list of texts"):
            run.generate(wrong)

    copy = run.save("adapter")
    assert all(torch.equal(tensors[n], t) for n, t in load_file(copy / "adapter.safetensors").items())
    scores = run.test()
    assert scores["test_loss"] == pytest.approx(run.scores["test_loss"]) and "test_exact_match" in scores
    assert (run.folder / "test_scores.json").is_file() and not run.model.training


class Steps(L.Callback):
    """Counts, and interrupts itself at the end of one step."""

    def __init__(self, stop: int = -1) -> None:
        self.seen, self.stop = 0, stop

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen += 1
        if trainer.global_step == self.stop:
            os.kill(os.getpid(), signal.SIGINT)


def test_options_of_a_wrong_type_are_said_where_they_are_written() -> None:
    with pytest.raises(UserError, match=r"layers must be .*, got 2.5; num_experts must be int, got '4'"):
        talklora_pl.AdapterConfig(num_experts="4", layers=2.5)  # type: ignore[arg-type]


def test_what_an_adapter_begins_from_is_an_option_too() -> None:
    config = talklora_pl.method("loramoe", init_from=["one", "two"], init_weights=[0.5, 0.5])
    options = adapter_options(config)
    assert (options["init_from"], options["init_weights"]) == (["one", "two"], [0.5, 0.5])
    assert "init_noise" not in options


def test_objects_as_options(
    base: str, here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Any] = []
    counted = lambda *args, **options: exported.append(args) or export_checkpoint(*args, **options)  # noqa: E731
    monkeypatch.setattr("talklora_pl.callbacks.adapter_export.export_checkpoint", counted)
    caplog.set_level("INFO")
    steps, loggers = Steps(), [CSVLogger(here, name="csv", version=""), TensorBoardLogger(here / "board")]
    adapter = talklora_pl.method("lora", num_experts=2, router=TopK(k=1), rank=4)
    run = fit(
        BaseModel(base, dtype="float32"),
        [{"path": ROWS[:4], "task": "a"}, Source(ROWS[4:], task="b")],
        method=adapter,
        seed_everything=7,
        trainer={
            "callbacks": [steps, "LearningRateMonitor"],
            "logger": loggers,
            "val_check_interval": 1,
            "max_steps": 6,
        },
        **{"model.optimizer": torch.optim.SGD, "model.optimizer.lr": 0.5, "data.val": ROWS[:2]},
    )
    assert steps.seen == 6
    # loggers keep the folders that they were made with, and all else is in the run's
    assert list((here / "board/lightning_logs/version_0").glob("events*")) and not list(run.folder.glob("events*"))
    for name in ("run.json", "checkpoints/last.ckpt", "adapters/last/adapter.safetensors", "adapters/best/README.md"):
        assert (run.folder / name).is_file(), name
    for logger in loggers:
        own = f"{type(logger).__name__} writes into {logger.log_dir}, as it was made; config, checkpoints and adapters"
        assert caplog.text.count(own) == 1
    assert len(exported) > 1 and caplog.text.count("Adapter of the best checkpoint") == 1
    assert "lr-SGD" in (here / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert run.tuner.adapter_config == adapter and run.tuner.base.dtype == "float32"
    assert run.run.datamodule.tasks == ["a", "b", "data"]
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["seed_everything"] == 7 and config["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert [source["path"] for source in config["data"]["train"]] == ["4 rows in Python", "4 rows in Python"]


def test_sources_as_a_config_has_them(base: str, here: Path) -> None:
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    listed = [{"path": "rows.jsonl", "task": "a", "weight": 3}, {"path": "rows.jsonl", "task": "b", "weight": 1}]
    named = {"a": {"path": "rows.jsonl", "weight": 3}, "b": Source("rows.jsonl", weight=1)}
    runs = [fit(base, train) for train in (listed, named)]
    assert runs[0].scores == runs[1].scores and runs[0].generate("2 and", 0) == ""
    assert [run.run.datamodule.tasks for run in runs] == [["a", "b"]] * 2
    assert [s.weight for s in runs[1].run.datamodule.sources["train"]] == [3, 1]


@pytest.mark.slow
def test_an_interrupt_saves_and_the_next_fit_goes_on(base: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(base, trainer={"callbacks": [Steps(stop=1)], "max_steps": 3})
    assert Path("runs/version_0/checkpoints/last.ckpt").is_file()
    run = fit(base, trainer={"max_steps": 3}, ckpt_path="last")
    assert run.folder.name == "version_0" and run.run.trainer.global_step == 3
    whole = fit(base, trainer={"max_steps": 3})  # a third fit of this process
    assert whole.scores == run.scores and whole.folder.name == "version_1"


def test_classes(base: str) -> None:
    rows = [{"text": "lovely" if i % 2 else "bad", "label": "good" if i % 2 else "bad"} for i in range(8)]
    run = fit(BaseModel(base, task="sequence_classification"), rows)
    assert {record["answer"] for record in run.predict([{"text": "lovely"}, {"text": "bad"}])} <= {"good", "bad"}
    with pytest.raises(UserError, match="a text alone is no row of kind 'classification'"):
        run.generate("lovely")


def test_a_mistake_is_one_user_error(base: str, llama: Any) -> None:
    for wrong, said in (
        ({"model": {"adaptor": 1}, "trainer": {"max_stps": 1}}, "(?s)Did you mean model.adapter.*trainer.max_steps"),
        ({"modl": {"adapter": 1}}, "There is no option 'modl'"),
        ({"method": "talklra"}, "no method 'talklra'. Did you mean 'talklora'"),
        ({"config": "recipe/nothing"}, "no file 'recipe/nothing'"),
        ({"model": {"optimizer": lambda p: None}}, "model.optimizer: a function cannot be written into a config"),
        ({"rows": 3}, "int is not what data can be"),
        ({"rows": "8 rows in Python"}, "only names: give them again"),
        ({"run_name": ""}, "--run_name: '' is not the name of a folder"),
        ({"rows": [{"promt": "a"}]}, "promt"),
        ({"model": {"adapter.num_experts": 5}}, "rank 32 is not divisible"),
    ):
        with pytest.raises(UserError, match=said):
            fit(base, **wrong)
    with pytest.raises(UserError, match="a LlamaForCausalLM that is loaded already"):
        fit(llama)
    with pytest.raises(UserError, match="base is a NoneType"):
        fit(None)
    for parts in ({"router": "top_k"}, {"balance": "switch"}, {"balance": ["switch"]}, {"experts": None}):
        with pytest.raises(UserError, match=f"adapter: {next(iter(parts))} must be"):
            AdapterConfig(**parts)
    assert [str(p) for p in Path("runs").rglob("*")] == []


def test_a_full_disk_is_a_user_error(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), b"runs/events")
    monkeypatch.setattr("talklora_pl.api.command_line.run", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"^runs/events: No space left on device\. What was whole before"):
        fit(base)


def test_options_without_a_method_file(base: str) -> None:
    """The default of one rank gives way to the other."""
    run = fit(base, method=None, model={"adapter": {"expert_rank": 2}}, trainer={"fast_dev_run": True})
    assert run.tuner.adapter_config == AdapterConfig(expert_rank=2)
