"""What a run shows of training itself: against numbers computed by hand in the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from talklora_pl.callbacks import LoadBalance, SampleOutputs
from talklora_pl.cli import main
from talklora_pl.optim import ParamGroup, WarmupCosine
from tests.monitoring.test_load_balance import scalars

Fit = Callable[..., L.Trainer]


class Watch(L.Callback):
    """Gradient norm before clipping, pads and tokens of every step, the plain way."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.batches: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == len(self.batches):
            self.batches.append([])
        self.batches[-1].append(batch["attention_mask"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        squares = [p.grad.double().square().sum() for p in pl_module.trained().values() if p.grad is not None]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


def test_numbers_of_the_logged_steps(fit: Fit, tmp_path: Path) -> None:
    watch = Watch()
    module = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.2),
        "lr_scheduler": lambda o: WarmupCosine(o, warmup_ratio=0.5, min_lr_ratio=0.1),
        "param_groups": [ParamGroup(r"router|communication", lr=0.1)],
    }
    fit(watch, module=module, accumulate_grad_batches=2, gradient_clip_val=1e-3, val_check_interval=2)
    logged = scalars(tmp_path / "run")
    assert logged["train/grad_norm"] == pytest.approx({1: watch.norms[1], 3: watch.norms[3]}, rel=1e-5)
    rates = {1: 0.5, 3: 0.1 + 0.9 * 0.5}  # of the second step of two, half-way of two others
    assert logged["train/lr"] == pytest.approx({s: 0.2 * f for s, f in rates.items()})
    assert logged["train/lr_router_communication"] == pytest.approx({s: 0.1 * f for s, f in rates.items()})
    for step in (1, 3):
        masks = [mask.double() for mask in watch.batches[step]]
        pads = 1 - sum(m.sum() for m in masks) / sum(m.numel() for m in masks)
        assert logged["cost/pad_share"][step] == pytest.approx(float(pads), abs=1e-6) and pads > 0
        assert logged["cost/tokens_per_second"][step] > 0 and logged["cost/peak_memory_gib"][step] > 0.01


def test_other_steps_compute_nothing(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[int] = []
    one = lambda grads: norms.append(1) or torch.ones(())  # noqa: E731
    monkeypatch.setattr("talklora_pl.callbacks.run_metrics.get_total_norm", one)
    fit(log_every_n_steps=3, max_steps=5, limit_val_batches=0)
    assert len(norms) == 1


def test_samples_are_the_models_answers_to_the_same_prompts(fit: Fit, tmp_path: Path) -> None:
    fit(SampleOutputs(2, prompts=["hello"], max_new_tokens=3), val_check_interval=2)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0})
    events.Reload()
    shown = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")]
    assert len(shown) == 2 and [text.count("prompt:") for text in shown] == [3, 3]
    first, second = ([part for part in text.split("prompt:\n\n    ")[1:]] for text in shown)
    assert first[0].startswith("<s>hello\n") and "right:" not in first[0]
    assert [part.split("\n")[0] for part in first] == [part.split("\n")[0] for part in second]
    assert all("right:\n\n    " in part for part in first[1:])


def test_the_picture_of_communication_is_the_change_since_the_start(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talklora_pl.monitoring import figures

    drawn: list[dict[str, torch.Tensor]] = []
    draw = figures.communication
    monkeypatch.setattr(figures, "communication", lambda m, change: drawn.append(m) or draw(m, change))
    begin: dict[str, torch.Tensor] = {}

    class Begin(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            begin.update(
                {n: p.detach().clone() for n, p in pl_module.trained().items() if n.endswith("communication.C")}
            )

    balance = LoadBalance()
    trainer = fit(Begin(), balance, module={"optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}, val_check_interval=2)
    end = {n: p.detach() for n, p in trainer.lightning_module.trained().items() if n in begin}
    assert len(drawn) == 2 and len(begin) == 10
    for name, change in drawn[-1].items():
        key = f"layers.{name}.communication.C"
        torch.testing.assert_close(change, end[key] - begin[key])
    assert max(change.abs().max() for change in drawn[-1].values()) > 0
    again = LoadBalance()
    again.load_state_dict(balance.state_dict())  # of a checkpoint
    assert torch.equal(again._start[name], begin[key])


def test_tensorboard_begins_with_losses_and_tells_runs_apart(base: Any, rows: Any, tmp_path: Path) -> None:
    argv = ["--config", "method/talklora", "--model.base.path", base.path, "--data.train", rows[0]["path"]]
    argv += ["--data.rows", "choice", "--data.val_size", "4", "--data.test", rows[0]["path"], "--seed_everything", "7"]
    argv += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_steps", "1"]
    argv += ["--trainer.val_check_interval", "1"]
    argv += ["--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", *argv]) == 0
    assert main(["test", *argv, "--ckpt_path", "last"]) == 0
    run = tmp_path / "version_0"
    logged = scalars(run)
    groups = sorted({tag.partition("/")[0] for tag in logged})
    assert groups[:2] == ["Loss", "Score"]
    assert logged["Loss/train"] == logged["train_loss"] and logged["Score/val_accuracy"] == logged["val_accuracy"]

    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(run))
    events.Reload()
    found = {
        key: plugin_data_pb2.HParamsPluginData.FromString(
            events.summary_metadata[f"_hparams_/{key}"].plugin_data.content
        )
        for key in ("experiment", "session_start_info")
    }
    values = found["session_start_info"].session_start_info.hparams
    assert (values["method"].string_value, values["seed"].number_value) == ("talklora", 7)
    assert values["about"].string_value == "talklora seed 7" and values["run"].string_value == "version_0"
    assert values["router"].string_value == "softmax(scores=features)"
    metrics = {info.name.tag for info in found["experiment"].experiment.metric_infos}
    assert {"test_accuracy", "val_accuracy", "val_loss"} <= metrics & logged.keys()
    assert "method: talklora" in (run / "hparams.yaml").read_text()
