"""docs/components.md, executed: an objective and a kind of rows of one's own, from one file to a trained adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.data import DataLoader

from talklora_pl import AdapterConfig, FineTuner, TextData
from talklora_pl.base import BaseModel, load_base
from talklora_pl.cli import main
from talklora_pl.cli.parts import components
from talklora_pl.data import Source
from talklora_pl.data.sampler import Batch
from talklora_pl.errors import UserError
from talklora_pl.objectives import Objective
from talklora_pl.registry import from_dict, import_plugins
from tests.data.tiny import save_model, tokenizer

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{i}?", "good": "yes" * (1 + i % 2), "bad": "not at all"} for i in range(11)]
PAGE = (ROOT / "docs/components.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin, rows and a float64 model."""
    folder = tmp_path_factory.mktemp("own")
    code = next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.S) if b.startswith("# pairs.py"))
    (folder / "pairs.py").write_text(code)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save_model(folder / "model", initializer_range=0.2)
    import_plugins([str(folder / "pairs.py")])
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def by_hand(model: Any, beta: float) -> tuple[float, float]:
    """Mean loss and accuracy over all rows, each sequence alone."""
    tok, losses = tokenizer(), []
    for row in ROWS:
        prompt, log_p = tok(row["prompt"]).input_ids, []
        for answer in (row["good"], row["bad"]):
            ids = torch.tensor([[*prompt, *tok(answer, add_special_tokens=False).input_ids, 257]])
            logits_SV = model(ids).logits[0, :-1].log_softmax(-1)
            log_p.append(logits_SV.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())
        losses.append(-F.logsigmoid(beta * (log_p[0] - log_p[1])).item())
    return sum(losses) / len(losses), sum(loss < -F.logsigmoid(torch.tensor(0.0)) for loss in losses) / len(losses)


def test_the_command_line_trains_and_validates(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "margin" in b)
    config = yaml.safe_load(block)
    config["model"]["base"] = {"path": "model", "dtype": "float32"}
    config["model"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 0.02}}
    config["data"] |= {"val": "pairs.jsonl", "batch_size": 3, "max_length": 60}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    config["trainer"] = quiet | {"max_epochs": 6, "default_root_dir": str(tmp_path / "runs"), "log_every_n_steps": 1}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    scores: list[dict[str, float]] = []
    epoch_end = FineTuner.on_validation_epoch_end

    def spied(self: FineTuner) -> None:
        scores.append(self.scores.compute()["mean"])
        epoch_end(self)

    monkeypatch.setattr(FineTuner, "on_validation_epoch_end", spied)
    args = ["--config", "method/talklora", "--config", str(tmp_path / "my.yaml")]
    assert main(["validate", *args]) == 0
    loss, accuracy = by_hand(load_base(BaseModel("model", dtype="float32")), beta=0.5)
    assert scores[-1] == {"loss": pytest.approx(loss, rel=1e-4), "accuracy": pytest.approx(accuracy)}
    assert main(["fit", *args]) == 0
    trained = scores[-1]
    assert trained["loss"] < 0.5 * loss and trained["accuracy"] == 1.0
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    assert main(["validate", *args, "--ckpt_path", str(checkpoint)]) == 0
    assert scores[-1]["loss"] == pytest.approx(trained["loss"], rel=1e-5)


class Losses(L.Callback):
    """The training loss of every optimiser step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.values.append(float(trainer.callback_metrics["train_loss"]))


def tuner(folder: Path) -> FineTuner:
    objective = from_dict(Objective, {"name": "margin", "beta": 0.5})
    base = BaseModel(str(folder / "model"), dtype="float32")
    L.seed_everything(0, verbose=False)
    return FineTuner(base, AdapterConfig(rank=8, targets="all-linear", dropout_input=0), objective=objective)


def losses(folder: Path, data: Any, **options: Any) -> list[float]:
    """Training losses of an epoch."""
    kept, quiet = Losses(), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options |= quiet | {"enable_checkpointing": False, "use_distributed_sampler": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=1, callbacks=[kept], default_root_dir=folder, **options).fit(tuner(folder), data)
    return kept.values


def rows_of(folder: Path, **options: Any) -> TextData:
    return TextData(str(folder / "pairs.jsonl"), val_size=0, max_length=60, **options)


def test_the_mean_is_over_rows_however_a_step_is_cut(folder: Path) -> None:
    whole = losses(folder, rows_of(folder, batch_size=4))
    assert len(whole) == 3
    assert losses(folder, rows_of(folder, batch_size=2), accumulate_grad_batches=2) == pytest.approx(whole, rel=1e-4)


def test_a_filler_has_no_loss(folder: Path) -> None:
    module = tuner(folder)
    data = rows_of(folder, base=module.base, objective=module.objective)
    data.prepare_data()
    data.setup("fit")
    rows = data.train_dataloader().dataset
    full, filler = (rows[Batch([3, 4], step_tokens=2, filler=filler)] for filler in (False, True))
    assert full["input_ids"].shape[0] == 4 and full["group"].tolist() == [0, 0, 1, 1]
    assert filler["input_ids"].shape == (4, 1) and not len(filler["loss_index"])
    loss, count = module.objective.loss(load_base(module.base), full)  # an adapter starts as the base
    batches = DataLoader([full, filler], batch_size=None, collate_fn=lambda batch: batch)
    assert losses(folder, batches, accumulate_grad_batches=2) == [pytest.approx(float(loss) / count, rel=1e-5)]


def test_both_are_listed(folder: Path) -> None:
    found = {(row["family"], row["name"]): row for row in components()}
    assert found["objective", "margin"]["options"] == [{"name": "beta", "type": "float", "default": 0.1}]
    assert found["rows", "pair"]["description"].startswith("A prompt, a good answer")
    assert {("objective", "sft"), ("objective", "classification"), ("rows", "chat")} <= found.keys()


@pytest.mark.parametrize(
    "objective, source, said",
    [
        (
            None,
            {"rows": "pair"},
            "pair rows do not fit model.objective: sft .* set model.objective: margin",
        ),
        ("margin", {"rows": "completion"}, "completion rows do not fit model.objective: margin .*takes pair"),
        ("margin", {"columns": {"goood": "x"}}, "no field 'goood'. Did you mean 'good'"),
    ],
)
def test_rows_that_do_not_fit(folder: Path, objective: str | None, source: dict[str, Any], said: str) -> None:
    base = BaseModel(str(folder / "model"))
    chosen = objective and from_dict(Objective, objective)
    rows = [Source(str(folder / "pairs.jsonl"), **source)]
    with pytest.raises(UserError, match=said):
        TextData(rows, base=base, max_length=60, objective=chosen or None).setup("fit")
