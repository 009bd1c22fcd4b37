"""A config.yaml of an earlier version parses, trains, and says once what is called otherwise today."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from talklora_pl import aliases
from talklora_pl.cli import main
from tests.data.tiny import save_model

OLD = Path(__file__).parent / "files" / "config_0.1.yaml"


def test_an_old_config_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(Path("base"))
    rows = [{"question": f"{i} and one?", "choices": [str(i + 1), str(i + 3)], "label": 0} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        assert main(["fit", "--config", str(OLD)]) == 0
    texts = [str(w.message) for w in said if "is now" in str(w.message)]
    assert texts.count("also_train is now modules_to_save; the old name goes in version 0.3.") == 1
    assert any("talklora_pl.schedules.WarmupLinear is now talklora_pl.optim.WarmupLinear" in text for text in texts)
    assert len(texts) == len(set(texts))
    # the new run's config has today's names alone, and runs too
    (config,) = Path("runs").rglob("config.yaml")
    written = config.read_text()
    old = [*aliases.KEYS, *(path.rstrip(".") for path in aliases.CLASS_PATHS if path.endswith("."))]
    assert [name for name in old if name in written] == []
    adapter = yaml.safe_load(written)["model"]["adapter"]
    assert adapter["modules_to_save"] == ["norm"] and "also_train" not in adapter
    checkpoint = torch.load(next(Path("runs").rglob("last.ckpt")), weights_only=True)
    assert any(name.endswith("norm.weight") for name in checkpoint["state_dict"])


def test_old_names_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.base.path", "x", "--model.adapter.also_train+=norm"]
    options += ["--model.lr_scheduler", "talklora_pl.schedules.WarmupLinear"]
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="is now"):
        main(["fit", *options, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]
    assert printed["adapter"]["modules_to_save"] == ["norm"]
    assert printed["lr_scheduler"]["class_path"] == "talklora_pl.optim.WarmupLinear"
