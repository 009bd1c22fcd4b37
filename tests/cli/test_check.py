"""What the check of options refuses, what it takes, and that nothing of a config is called before it is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from talklora_pl.cli import VERBS, main
from talklora_pl.cli.check import Check
from talklora_pl.cli.classes import find_class
from talklora_pl.cli.options import right, split
from talklora_pl.communication import Communication
from talklora_pl.errors import UserError
from talklora_pl.typed import parameters


@dataclass
class Item:
    path: str
    limit: int | None = None


@dataclass
class Part:
    size: int
    communication: Communication | None = None
    items: list[str | Item] | str | None = None
    numbers: dict[str, int] = field(default_factory=dict)


class Section:
    def __init__(
        self,
        part: Part,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        callbacks: list[Callback] | Callback | None = None,
        made: Callable[[], Any] | None = None,
        pair: tuple[float, float] = (0.0, 1.0),
        rate: float | Tensor = 1.0,
    ) -> None: ...


def problems(*argv: str) -> list[str]:
    check = Check({"it": Section}, {"name": str | None})
    right(split(list(argv)), check)
    return [str(problem) for problem in check.problems]


@pytest.mark.parametrize(
    "argv",
    [
        ("--it.part.size=8",),
        ("--it.part.size", "8", "--it.part.items", "a.csv"),
        ("--it.part.size=8", "--it.part.items=[a.csv, {path: b.csv, limit: 3}]"),
        ("--it.part.size=8", "--it.part.items+=a.csv", "--it.part.items+={path: b.csv}"),
        ("--it.part", "{size: 8, numbers: {a: 1}}"),
        ("--it", "{part.size: 8}"),
        ("--it.part.size=8", "--it.part.numbers.a=1"),
        ("--it.part.size=8", "--it.optimizer=SGD", "--it.optimizer.lr=1e-3"),
        ("--it.part.size=8", "--it.optimizer.class_path=SGD", "--it.optimizer.init_args.lr=1"),
        ("--it.part.size=8", "--it.optimizer={class_path: torch.optim.AdamW, init_args: {betas: [0.9, 0.99]}}"),
        ("--it.part.size=8", "--it.lr_scheduler=StepLR", "--it.lr_scheduler.step_size=3"),
        ("--it.part.size=8", "--it.callbacks+=EarlyStopping", "--it.callbacks.monitor=x"),
        ("--it.part.size=8", "--it.callbacks=[RichProgressBar]", "--it.made=whatever.this.is"),
        ("--it.part.size=8", "--it.part.communication=gnn", "--it.part.communication.graph=ring"),
        ("--it.part.size=8", "--it.pair=[1, 2]", "--name=3", "--it.rate=-1"),
    ],
)
def test_what_is_right_passes(argv: tuple[str, ...]) -> None:
    assert problems(*argv) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), ["it.part.size is required: --it.part.size, or the same in a config."]),
        (("--it.part.size=x",), ["it.part.size: x is not int."]),
        (("--it.part.size=null",), ["it.part.size: null is not int."]),
        (("--it.part.size",), ["it.part.size: there is no value: --it.part.size VALUE."]),
        (("--it.part.size=8", "--it.part.items=[{limit: 3}]"), ["it.part.items: Item needs its option 'path'."]),
        (
            ("--it.part.size=8", "--it.part.items=[{path: x, limit: y}]"),
            ["it.part.items: limit: y is not int or null."],
        ),
        (("--it.part.size=8", "--it.lr_scheduler=StepLR"), ["it.lr_scheduler.step_size is required: "]),
        (("--it.part.size=8", "--it.rate=fast"), ["it.rate: fast is not float."]),
        (
            ("--it.part.size=8", "--it.part.communication=gnnn", "--it.part.communication.graph=ring"),
            ["it.part.communication: Unknown communication 'gnnn'. Did you mean 'gnn'"],
        ),
        (("--it.part.size=8", "--it.nothing=1", "--no=1"), ["it.nothing: There is no", "no: There is no option 'no'."]),
    ],
)
def test_what_is_wrong_is_said_once(argv: tuple[str, ...], said: list[str]) -> None:
    found = problems(*argv)
    assert len(found) == len(said) and all(a.startswith(b) for a, b in zip(found, said)), found


def test_options_of_the_class_before_do_not_count_against_the_next() -> None:
    options = ["--it.part.size=1", "--it.optimizer=SGD", "--it.optimizer.momentum=0.9", "--it.optimizer=AdamW"]
    assert problems(*options) == []


@pytest.mark.parametrize("value", ["os.system", "{class_path: os.system, init_args: {command: 'touch called'}}"])
@pytest.mark.parametrize("option", ["model.lr_scheduler", "model.optimizer", "trainer.callbacks", "trainer.logger"])
def test_only_children_of_what_an_option_takes_are_called(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    called: list[Any] = []
    monkeypatch.setattr(os, "system", called.append)
    config = {option.partition(".")[0]: {option.partition(".")[2]: yaml.safe_load(value)}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    for argv in ([f"--{option}={value}"], ["--config=config.yaml"]):
        assert main(["fit", "--model.base.path=x", *argv]) == 2
        assert f"{option}: os.system is not a " in capsys.readouterr().err
    assert called == []


def test_a_bare_name_is_torchs_whatever_else_was_imported() -> None:
    from torch.optim import SGD, Optimizer

    other = type("SGD", (Optimizer,), {"__module__": "elsewhere"})  # as bitsandbytes has them
    assert find_class("SGD", (Optimizer,)) == ("torch.optim.sgd.SGD", SGD)
    assert other in Optimizer.__subclasses__()


def test_options_passed_on_to_a_base_are_known() -> None:
    class Base:
        def __init__(self, here: int, there: str = "") -> None: ...

    class Child(Base):
        def __init__(self, own: float, **kwargs: Any) -> None: ...

    class Open:
        def __init__(self, **kwargs: Any) -> None: ...

    takes, complete = parameters(Child)
    assert set(takes) == {"own", "here", "there"} and complete
    assert takes["own"].default is takes["own"].empty and takes["here"].default is None
    assert parameters(Open) == ({}, False)


def test_help_does_not_load_torch(tmp_path: Path) -> None:
    # the four of Lightning read their options from classes of Lightning, torch and ours
    verbs = [[verb, "--help"] for verb, (module, _) in VERBS.items() if module != "lightning"]
    others = [["--help"], ["--version"], ["fitt"], ["runs"], ["data", "write", "--help"], ["data", "preview", "--help"]]
    program = f"""
import sys, talklora_pl.cli
for argv in {[*others, *verbs]!r}:
    try:
        talklora_pl.cli.main(argv)
    except SystemExit:
        pass
    assert not (loaded := {{"torch", "lightning", "transformers", "datasets"}} & {{*sys.modules}}), (argv, loaded)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code in (0, None)
        assert "--" in capsys.readouterr().out


def test_a_component_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.adapter.communication.help", "gnn"])
    assert end.value.code in (0, None)
    assert "--model.adapter.communication.graph {complete" in capsys.readouterr().out


def test_the_checkout_runs_without_an_install(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    code = """
import runpy, sys, talklora_pl.callbacks as c, talklora_pl.cli.options as o
print(c.__file__, o.shipped_configs())
sys.argv[1:] = ["fit", "--model.base.path=x", "--print_config"]
runpy.run_module("talklora_pl", run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    places, _, config = done.stdout.partition("\n")
    assert all(Path(place).is_relative_to(root) for place in places.split())
    assert yaml.safe_load(config)["model"]["base"]["path"] == "x"


def test_private_names_of_jsonargparse_are_not_used() -> None:
    package = Path(__file__).parents[2] / "talklora_pl"
    for file in package.rglob("*.py"):
        assert "jsonargparse._" not in file.read_text(), file


class Untyped(Callback):
    """Its options take anything, and so nothing that is made from a config."""

    def __init__(
        self,
        anything: Any = None,
        thing: object = None,
        called: Callable[[int], int] | None = None,
        table: dict[str, Any] | None = None,
        bare=None,  # type: ignore[no-untyped-def]
        **more: Any,
    ) -> None: ...


CALL = "{class_path: os.system, init_args: {command: touch called}}"


@pytest.mark.parametrize(
    "options",
    [
        *(f"init_args: {{{name}: {CALL}}}" for name in ("anything", "thing", "called", "bare", "other")),
        f"init_args: {{table: {{a: [{CALL}]}}}}",
        f"init_args: {{thing: '{CALL}'}}",
        f"dict_kwargs: {{thing: {CALL}}}",
        f"dict_kwargs: {{other: {CALL}}}",
    ],
)
def test_a_class_is_made_only_where_its_kind_is_known(options: str) -> None:
    path = f"{__name__}.Untyped"
    (said,) = problems("--it.part.size=8", f"--it.callbacks=[{{class_path: {path}, {options}}}]")
    assert "os.system: this option does not say of which kind" in said
    assert not problems(
        "--it.part.size=8", f"--it.callbacks=[{{class_path: {path}, init_args: {{table: {{a: [1]}}}}}}]"
    )


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000])
def test_long_numbers_and_deep_lists_are_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"it: {{part: {{size: {text}}}}}")
    with pytest.raises(UserError, match=r"my\.yaml is not readable as YAML"):
        split(["--config", str(tmp_path / "my.yaml")])
    assert problems("--it.part.size", text)
