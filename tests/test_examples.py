"""TalkLoRA in 60 lines is TalkLoRA: the example and the adapted Linear compute the same, values and gradients."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.experts.shared_b import SharedB

FILE = Path(__file__).parents[1] / "examples/talklora_in_60_lines.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
