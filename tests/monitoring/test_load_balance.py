"""What a run logs, against loads computed by hand from the routing of the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from talklora_pl.adapter import AdapterConfig
from talklora_pl.callbacks import LoadBalance

Fit = Callable[..., L.Trainer]


class Keep(L.Callback):
    """Weights of the real tokens of every micro-step, gathered with a loop and nothing else."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, list[torch.Tensor]]] = {}
        self.aggregates: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        kept = self.steps.setdefault(self.step, {})
        flat = batch["attention_mask"].reshape(-1)
        for r in pl_module.routing:
            for t in range(len(flat)):
                if flat[t]:
                    kept.setdefault(r.layer, []).append(r.routing.weights_TE[t].detach())

    def max_vio(self, step: int) -> float:
        shares = [torch.stack(rows).mean(0) for rows in self.steps[step].values()]
        return float(sum(len(s) * s.max() - 1 for s in shares) / len(shares))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_loads_are_those_of_the_whole_step(fit: Fit, tmp_path: Path) -> None:
    keep = Keep()
    fit(keep, LoadBalance(figures=False), accumulate_grad_batches=2)
    logged = scalars(tmp_path / "run")["load/max_vio"]
    assert sorted(logged) == [1, 3]
    for step, value in logged.items():
        assert value == pytest.approx(keep.max_vio(step), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(fit: Fit, tmp_path: Path) -> None:
    logged = []
    for on in (False, True):
        fit(LoadBalance(figures=False), module={"gradient_checkpointing": on})
        logged.append({k: v for k, v in scalars(tmp_path / "run").items() if "load/" in k})
        for file in (tmp_path / "run").iterdir():
            file.unlink()
    assert logged[0].keys() == logged[1].keys()
    for tag, values in logged[0].items():
        assert values == pytest.approx(logged[1][tag], rel=1e-4, abs=1e-6), tag


def test_detailed_logs_every_layer_and_expert(fit: Fit, tmp_path: Path) -> None:
    fit(LoadBalance("detailed", figures=False), limit_val_batches=0)
    logged = scalars(tmp_path / "run")
    layer = "model.layers.1.self_attn.q_proj"
    experts = [logged[f"load_experts/{layer}/{i}"][1] for i in range(4)]
    assert sum(experts) == pytest.approx(4)
    assert logged[f"load_layers/max_vio/{layer}"][1] == pytest.approx(max(experts) - 1, abs=1e-5)
    per_layer = [v[1] for tag, v in logged.items() if tag.startswith("load_layers/cv/")]
    assert len(per_layer) == 10
    assert sum(per_layer) / 10 == pytest.approx(logged["load/cv"][1], rel=1e-5)


def test_event_file_has_pictures_text_layout_and_hyperparameters(fit: Fit, tmp_path: Path) -> None:
    fit(LoadBalance(), val_check_interval=4)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {
        "experts/allocation", "experts/load", "experts/tasks", "experts/communication",
    }  # fmt: skip
    assert all(e.width > 400 and e.height > 300 for e in events.Images("experts/tasks"))
    assert "custom_scalars__config__" in tags["tensors"]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["communication"].string_value == "talking"
    assert session.hparams["expert_rank"].number_value == 2
    # names of metrics only: no invented point at the start of a curve
    assert 0 not in scalars(tmp_path / "run")["load/cv"]


def test_other_loggers_get_the_scalars(fit: Fit, tmp_path: Path) -> None:
    fit(LoadBalance(), val_check_interval=2, logger=CSVLogger(tmp_path, name="", version="csv"))
    header = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert "load/cv" in header and "val_load/cv" in header
    assert "communication: talking" in (tmp_path / "csv" / "hparams.yaml").read_text()


def test_no_logger_at_all(fit: Fit) -> None:
    trainer = fit(LoadBalance("detailed"), logger=False)
    assert "load/cv" in trainer.callback_metrics


class OtherRouters(L.Callback):
    """Decides everything anew."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for name, p in pl_module.trained().items():
            if ".router." in name:
                torch.nn.init.normal_(p)


def test_churn_is_measured_on_the_same_tokens_and_survives_a_restart(fit: Fit, tmp_path: Path) -> None:
    module = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    before, after = LoadBalance(figures=False), LoadBalance(figures=False)
    trainer = fit(before, module=module, val_check_interval=1)
    assert trainer.callback_metrics["val_load/churn"] == 0  # nothing was learned
    path = str(tmp_path / "last.ckpt")
    trainer.save_checkpoint(path)
    # one step: the only evaluation to compare with is the one before the restart
    again = fit(after, OtherRouters(), max_steps=5, val_check_interval=1, ckpt=path, module=module)
    first, second = before.state_dict()["probe"], after.state_dict()["probe"]
    assert first["text"] == second["text"]
    changed = [(a != second["experts"][k]).float().mean() for k, a in first["experts"].items()]
    assert again.callback_metrics["val_load/churn"] == pytest.approx(float(sum(changed) / len(changed)), abs=1e-6)
    assert sum(changed) > 0


def test_one_expert_has_nothing_to_balance(fit: Fit, tmp_path: Path) -> None:
    adapter = AdapterConfig.from_dict(
        {"num_experts": 1, "expert_rank": 4, "dropout_input": 0.0, "communication": "none", "router": "uniform"}
    )
    fit(LoadBalance(), adapter=adapter)
    assert not [tag for tag in scalars(tmp_path / "run") if "load" in tag]


def test_pictures_without_validation(fit: Fit, tmp_path: Path) -> None:
    fit(LoadBalance(figure_steps=2), limit_val_batches=0)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0})
    events.Reload()
    assert [e.step for e in events.Images("experts/load")] == [1, 3]  # the slider
