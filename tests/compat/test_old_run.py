"""A run of version 0.1, half-way through: its config, checkpoint and adapter folder are still good.

``v0.1`` was written by that version: three of six steps, with a head that is trained along (``also_train`` then), and
the losses of the six steps in one go.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from talklora_pl import load_adapter
from talklora_pl.base import BaseModel, load_base
from talklora_pl.cli import main
from tests.sameness import Losses


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(Path(__file__).parent / "v0.1", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.usefixtures("plain_dropout")
def test_it_goes_on_where_it_stopped(old: Path) -> None:
    Losses.values = []
    options = ["--trainer.callbacks=tests.sameness.Losses", "--trainer.max_steps=6", "--trainer.default_root_dir=runs"]
    assert main(["fit", "--config=my.yaml", "--ckpt_path=run/checkpoints/last.ckpt", *options]) == 0
    assert Losses.values == pytest.approx(json.loads((old / "losses.json").read_text())[3:], rel=1e-5)


def test_its_checkpoint_becomes_the_same_folder(old: Path) -> None:
    assert main(["export", "run/checkpoints/last.ckpt", "--base=base", "--out=new"]) == 0
    then, now = load_file("run/adapters/last/adapter.safetensors"), load_file("new/adapter.safetensors")
    assert then.keys() == now.keys()
    assert all(torch.equal(then[k], now[k]) for k in then)
    options = json.loads((old / "new/talklora.json").read_text())["adapter"]
    assert options["modules_to_save"] == ["lm_head"]
    assert "also_train" not in options


def test_its_adapter_folder_computes_the_same_as_what_is_exported_today(old: Path) -> None:
    assert main(["export", "run/checkpoints/last.ckpt", "--base=base", "--out=new"]) == 0
    ids, logits = torch.arange(12)[None], []
    for folder in ("run/adapters/last", "new"):
        model = load_base(BaseModel("base", dtype="float32"))
        load_adapter(model, folder)
        logits.append(model(ids).logits)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], load_base(BaseModel("base", dtype="float32"))(ids).logits)
