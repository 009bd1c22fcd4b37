"""Alarms start after the patience, are said once, and can start again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from talklora_pl import UserError
from talklora_pl.callbacks import FiniteGuard, LoadBalance
from talklora_pl.monitoring.alerts import AlertRules, Alerts
from talklora_pl.monitoring.metrics import Load
from talklora_pl.routing import Routing, RoutingRecord
from tests.monitoring.test_metrics import dense, load_of, sparse
from tests.operators import Operators

GOOD = [[0.25] * 4] * 4
COLLAPSED = [[0.97, 0.01, 0.01, 0.01]] * 4


def says(alerts: Alerts, *loads: Load) -> list[list[str]]:
    """Names of the alerts that give a warning, step by step."""
    return [[key for key, _, text in alerts.check(load, i, 0.05) if text] for i, load in enumerate(loads)]


def test_collapse_is_said_once_and_again_after_it_has_ended() -> None:
    good, bad = load_of(dense("a", GOOD)), load_of(dense("a", COLLAPSED))
    alerts = Alerts(AlertRules(patience=2))
    said = says(alerts, bad, bad, bad, good, bad, bad)
    assert [step for step, keys in enumerate(said) if "collapse" in keys] == [1, 5]


def test_message_names_layer_expert_step_and_remedy() -> None:
    alerts = Alerts(AlertRules(patience=1))
    load = load_of(dense("model.layers.0.q_proj", GOOD), dense("model.layers.1.q_proj", COLLAPSED))
    text = {key: text for key, _, text in alerts.check(load, 7, 0.05)}
    assert "model.layers.1.q_proj" in text["collapse"] and "expert 0 has 97%" in text["collapse"]
    assert "step 7, 1 of 2 routed layers" in text["collapse"] and "balance loss" in text["collapse"]
    assert "75% of its experts are dead" in text["dead_experts"]
    assert all("\n" not in line for line in text.values())


def test_selecting_routers_collapse_by_tokens_unless_they_select_everyone() -> None:
    one_of_four = load_of(sparse("a", COLLAPSED, 2))
    both_of_two = load_of(sparse("a", [[0.9, 0.1]] * 4, 2))
    assert "collapse" in says(Alerts(AlertRules(patience=1)), one_of_four)[0]
    assert says(Alerts(AlertRules(patience=1)), both_of_two) == [[]]


@pytest.mark.parametrize("size", [60.0, float("nan"), float("inf")])
def test_router_z(size: float) -> None:
    r = dense("a", GOOD)
    load = load_of(RoutingRecord("a", Routing(*r.routing[:2], torch.full((4, 4), size)), r.mask_T))
    assert says(Alerts(AlertRules(patience=1)), load) == [["router_z"]]


def test_a_restart_neither_repeats_nor_forgets() -> None:
    bad = load_of(dense("a", COLLAPSED))
    first, second = Alerts(AlertRules(patience=2, dead_share=2)), Alerts(AlertRules(patience=2, dead_share=2))
    assert says(first, bad) == [[]]
    second.restore(first.state())
    assert says(second, bad, bad) == [["collapse"], []]


class Collapse(L.Callback):
    """One expert speaks for everyone."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for module in pl_module.adapter.modules():
            if hasattr(module, "router"):
                module.router.temperature = 1e-9


def test_one_line_in_the_terminal_and_text_in_tensorboard(fit: Callable[..., L.Trainer], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="dead_experts: step 2") as caught:
        fit(
            LoadBalance(figures=False, alerts=AlertRules(patience=2, dead_share=0.25), dead_below=2.0),
            Collapse(),
            log_every_n_steps=1,
            max_steps=6,
        )
    (said,) = [w for w in caught if "dead_experts:" in str(w.message)]
    line = warnings.formatwarning(said.message, said.category, said.filename, said.lineno)  # type: ignore[arg-type]
    assert line.count("\n") == 1
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("alerts/dead_experts/text_summary")
    assert b"dead_experts: step 2" in event.tensor_proto.string_val[0]
    assert [e.value for e in events.Scalars("alerts/dead_experts")] == [0, 10, 10, 10, 10, 10]


def test_the_guard_looks_at_all_gradients_at_once(fit: Callable[..., L.Trainer]) -> None:
    """Some operators a step, and not some for each of the trained tensors."""

    class Counted(FiniteGuard):
        def on_before_optimizer_step(self, *args: Any) -> None:
            with Operators() as operators:
                super().on_before_optimizer_step(*args)
            counted.append(len(operators.names))

    counted: list[int] = []
    trainer = fit(Counted(), limit_val_batches=0, max_steps=2)
    assert len(list(trainer.lightning_module.trained())) > 20 > max(counted)  # type: ignore[operator]


class Spoil(L.Callback):
    """A weight that is no number, from the third step on."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            next(iter(pl_module.trained().values())).data.fill_(float("nan"))


def test_a_loss_that_is_no_number_is_in_tensorboard_too(fit: Callable[..., L.Trainer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss of step 3 is not finite; example ids: \[.*\d") as stopped:
        fit(FiniteGuard(), Spoil(), LoadBalance(figures=False), limit_val_batches=0, default_root_dir=tmp_path)
    assert len(list(tmp_path.rglob("nonfinite.ckpt"))) == 1
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("alerts/nonfinite/text_summary")
    (text,) = event.tensor_proto.string_val
    assert str(stopped.value).startswith(text.decode())
