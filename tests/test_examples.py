"""TalkLoRA in 60 lines is TalkLoRA: the example and the adapted Linear compute the same, values and gradients.

The other examples run, on a tiny model in place of the named one.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.experts.shared_b import SharedB
from talklora_pl.runs import all_runs
from tests.data.tiny import save_model

EXAMPLES = Path(__file__).parents[1] / "examples"
FILE = EXAMPLES / "talklora_in_60_lines.py"


def imported(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> Any:
    return imported(FILE.stem)


def close(got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    assert got is not None and want is not None and want.abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("E, R, D, O", [(4, 2, 16, 12), (3, 5, 7, 9), (1, 4, 6, 6)])
def test_two_layers_that_share_b(example: Any, E: int, R: int, D: int, O: int) -> None:
    torch.manual_seed(0)
    ours = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(D, O)}) for _ in range(2)]).double()
    options = AdapterConfig(
        targets=["up"], num_experts=E, expert_rank=R, dropout_input=0.0, experts=SharedB(), dtype="float64"
    )
    B_EOR = nn.Parameter(torch.randn(E, O, R, dtype=torch.float64))
    theirs = [example.TalkLoRA(nn.Linear(D, O), B_EOR).double() for _ in range(2)]
    for mine, other in zip(ours, theirs, strict=True):
        other.B_EOR = B_EOR
        other.frozen.load_state_dict(mine["up"].state_dict())
    adapter = inject(ours, options)
    layers = [adapter.layers.get_submodule(f"{l}.up") for l in range(2)]
    pairs = [
        pair
        for layer, other in zip(layers, theirs, strict=True)
        for pair in (
            (layer.experts.A, other.A_ERD),
            (layer.experts.core, other.K_ERR),
            (layer.communication.C, other.C_EE),
            (layer.router.scores.weight, other.G_EM),
        )
    ]
    shared = layers[0].experts.shared[0].B
    with torch.no_grad():
        shared.copy_(B_EOR.transpose(1, 2))
        for mine, other in pairs:
            mine.copy_(other)

    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    x_TD = x.detach().reshape(-1, D).requires_grad_()
    cotangents = torch.randn(2, 10, O, dtype=torch.float64)
    for l in range(2):
        y, y_TO = ours[l]["up"](x), theirs[l](x_TD)
        close(y.reshape(-1, O), y_TO)
        y.reshape(-1, O).backward(cotangents[l])
        y_TO.backward(cotangents[l])
    close(x.grad.reshape(-1, D) if x.grad is not None else None, x_TD.grad)
    close(shared.grad.transpose(1, 2), B_EOR.grad)
    for mine, other in pairs:
        if E == 1 and other.grad is not None and not other.grad.any():  # one expert: nothing to decide
            assert not mine.grad.any()
        else:
            close(mine.grad, other.grad)


def test_stands_alone() -> None:
    text = FILE.read_text()
    assert len(text.splitlines()) <= 60
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported == {"torch"}


def test_learns(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example.main()
    assert losses[-1] < 0.6 * losses[0]
    assert capsys.readouterr().out.count("loss") == 7


def test_all_are_listed() -> None:
    files = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb", ".sh")}
    assert set(re.findall(r"^\| \[.*\]\((.*)\) \|", (EXAMPLES / "README.md").read_text(), re.M)) == files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("examples") / "base").path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    yield tmp_path
    sys.modules.pop("own_component", None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def adapter(folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = json.loads((folder / "talklora.json").read_text())["adapter"]
    return options


@pytest.mark.slow
def test_fit_from_python(tiny: str, here: Path) -> None:
    run = imported("train").main(tiny, steps=2)
    assert {"train_loss", "test_loss"} <= run.scores.keys() and adapter(here / "sums-adapter")["num_experts"] == 4


@pytest.mark.slow
def test_own_component(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = imported("own_component").main(tiny, steps=2)
    assert adapter(here / "ring-adapter")["communication"] == {"name": "ring", "share": 0.2}
    assert "in the 10 layers" in capsys.readouterr().out
    assert (run.folder / "config.yaml").read_text().count("own_component.py") == 1


@pytest.mark.slow
def test_preference_tuning(tiny: str, here: Path) -> None:
    tuned = imported("preference").main(tiny, steps=2)
    assert 0 <= tuned.scores["val_accuracy"] <= 1
    assert [run.name for run in all_runs(here)] == ["answers", "preferences"]
    before, after = adapter(here / "answers-adapter"), adapter(here / "preference-adapter")
    assert before == after | {"dropout_input": before["dropout_input"]}  # pairs are learned without


@pytest.mark.slow
def test_upcycling(tiny: str, here: Path) -> None:
    run = imported("upcycling").main(tiny, steps=2)
    assert adapter(here / "mixture-adapter")["num_experts"] == 2
    assert [run.name for run in all_runs(here)] == ["sums", "products", "mixture"] and run.scores["train_loss"] > 0


@pytest.mark.slow
def test_compare(tiny: str, here: Path) -> None:
    table = here / imported("compare").main(tiny, steps=2)
    assert "talklora" in table.read_text() and len(all_runs(here)) == 4


@pytest.mark.slow
def test_many_nodes(tiny: str, here: Path) -> None:
    rows = [{"prompt": f"{n} is", "completion": f" {n}"} for n in range(32)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--data.rows", "completion", "--trainer.accelerator", "cpu", "--trainer.max_steps", "2"]
    command = ["bash", str(EXAMPLES / "many_nodes.sh"), tiny, "rows.jsonl", *more]
    common = {"NODES": "2", "DEVICES": "1", "PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    common["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    nodes = [
        subprocess.Popen(command, env={**os.environ, **common, "NODE": str(node)}, stderr=subprocess.PIPE, text=True)
        for node in range(2)
    ]
    for node in nodes:
        said = node.communicate(timeout=300)[1]
        assert node.returncode == 0, said[-3000:]
    (run,) = all_runs(here)
    assert (run.name, run.state) == ("many-nodes", "finished")
