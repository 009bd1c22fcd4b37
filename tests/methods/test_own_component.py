"""docs/components.md, executed: one file, one class, and everything else follows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from talklora_pl import UserError, registry
from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.adapter.io import load_adapter, save_adapter
from talklora_pl.balance import Balance
from talklora_pl.communication import Communication
from talklora_pl.registry import import_plugins
from talklora_pl.routing import Routing, RoutingRecord
from tests.conftest import tiny_llama

ROOT = Path(__file__).parents[2]
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/components.md").read_text(), re.S)
    code = next(b for b in blocks if b.startswith("# gossip.py"))
    assert len(code.splitlines()) <= 40
    path = tmp_path_factory.mktemp("plugin") / "gossip.py"
    path.write_text(code)
    return path


def run(*argv: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_folding(plugin: Path) -> None:
    """Logits and gradients of the folded layer are those of the plain one."""
    import_plugins([str(plugin)])
    module: Any = registry.get(Communication, "gossip").build.__globals__["GossipModule"]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/components.md").read_text(), re.S)
    names: dict[str, Any] = {"torch": torch}
    exec(next(b for b in blocks if b.startswith("def fold")), names)
    module.fold = names["fold"]
    config = AdapterConfig.from_dict({"rank": 8, "dropout_input": 0.0, "communication": "gossip", "dtype": "float64"})
    model = tiny_llama().double()
    adapter = inject(model, config)
    layers = [m for m in adapter.modules() if hasattr(m, "fold") and hasattr(m, "communication")]
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    results = []
    for fold in (True, False):
        for layer in layers:
            layer.fold = fold
        assert all(layer._folds(torch.float64) for layer in layers)
        adapter.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in adapter.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_options_training_saving_loading(plugin: Path, tmp_path: Path) -> None:
    import_plugins([str(plugin)])
    config = AdapterConfig.from_dict(
        {"rank": 8, "dropout_input": 0.0, "communication": {"name": "gossip", "start": 1.0}}
    )
    model = tiny_llama()
    adapter = inject(model, config)
    assert adapter.layers.get_submodule("model.layers.0.self_attn.q_proj").communication.logit.item() == 1.0
    for name, p in adapter.named_parameters():
        if name.startswith("bank"):
            torch.nn.init.normal_(p)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    save_adapter(model, tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "talklora.json").read_text())["adapter"]["communication"]
    assert stored == {"name": "gossip", "start": 1.0}
    want = model(IDS).logits
    again: Any = tiny_llama()
    load_adapter(again, tmp_path / "adapter", plugins=[str(plugin)])
    torch.testing.assert_close(again(IDS).logits, want)
    with pytest.raises(UserError, match="no option 'strat'"):
        AdapterConfig.from_dict({"rank": 8, "communication": {"name": "gossip", "strat": 1.0}})


@pytest.mark.slow
def test_in_fresh_processes(plugin: Path, tmp_path: Path) -> None:
    """Listed, in --help, and loaded where it is named; unknown where it is not."""
    table = json.loads(run("-m", "talklora_pl", "components", "--json", "--plugins", f"[{plugin}]"))
    row = next(r for r in table if r["name"] == "gossip")
    assert row["family"] == "communication" and row["description"].startswith("Experts pass on")
    assert row["options"] == [{"name": "start", "type": "float", "default": 0.0}]
    text = run("-m", "talklora_pl", "fit", "--plugins", f"[{plugin}]", "--model.adapter.communication.help", "gossip")
    assert "--model.adapter.communication.start" in text
    import_plugins([str(plugin)])
    model = tiny_llama()
    inject(model, AdapterConfig.from_dict({"rank": 8, "communication": "gossip"}))
    save_adapter(model, tmp_path / "adapter")
    code = (
        "import sys; from tests.conftest import tiny_llama; from talklora_pl.adapter.io import load_adapter\n"
        "from talklora_pl import UserError\n"
        "try:\n    load_adapter(tiny_llama(), sys.argv[1])\n"
        "except UserError as e:\n    print(e)\n"
        "load_adapter(tiny_llama(), sys.argv[1], plugins=[sys.argv[2]]); print('loaded')"
    )
    out = run("-c", code, str(tmp_path / "adapter"), str(plugin))
    assert "Unknown communication 'gossip'" in out and "plugins" in out and out.endswith("loaded\n")


def test_a_balance_loss_leaves_out_pads_and_is_one_when_balanced(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/components.md").read_text(), re.S)
    path = tmp_path / "spread.py"
    path.write_text(next(b for b in blocks if b.startswith("# spread.py")))
    import_plugins([str(path)])
    loss: Any = registry.from_dict(Balance, {"name": "spread", "scope": "model"}).build({"layers.0": 2, "layers.1": 2})
    mask_T = torch.tensor([True, True, False])
    one_sided, even = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.full((3, 2), 0.5)

    def of(*weights: torch.Tensor) -> float:
        return float(loss([RoutingRecord(f"layers.{i}", Routing(w, w, w), mask_T) for i, w in enumerate(weights)]))

    assert of(even, even) == 1
    assert of(one_sided, one_sided) == 2
    assert of(one_sided, even) == 2 * (0.75**2 + 0.25**2)


def test_a_file_named_like_a_loaded_module_is_not_left_out(tmp_path: Path) -> None:
    """In silence its components would be missing."""
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UserError, match=r"another of that name is loaded .*json.*Give the file another name"):
        import_plugins([str(tmp_path / "json.py")])
    (tmp_path / "mine_once.py").write_text("")
    import_plugins([str(tmp_path / "mine_once.py")] * 2)
    del sys.modules["mine_once"]


@pytest.mark.parametrize("status", ["", "0", "3"])
def test_a_file_that_ends_the_program_does_not_end_it_well(status: str, tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text(f"import sys\nsys.exit({status})")
    with pytest.raises(UserError, match=r"leaves\.py' ended the program"):
        import_plugins([str(tmp_path / "leaves.py")])
